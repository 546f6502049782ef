"""The skeletons that a mixer plugs into; they alone carry timm's model contract."""

from visionmix.backbones.grid import Grid
from visionmix.backbones.hierarchical import Hierarchical, Stage
from visionmix.backbones.plain import Plain

__all__ = ["Grid", "Hierarchical", "Plain", "Stage"]

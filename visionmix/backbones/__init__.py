"""The skeletons that a mixer plugs into; they alone carry timm's model contract."""

from visionmix.backbones.block import Block, Residual, TokenBlock, TwoPositionBlock
from visionmix.backbones.hierarchical import Hierarchical, Stage
from visionmix.backbones.parallel import Parallel
from visionmix.backbones.plain import Plain
from visionmix.layers.grid import Grid

__all__ = ["Block", "Grid", "Hierarchical", "Parallel", "Plain", "Residual", "Stage", "TokenBlock", "TwoPositionBlock"]

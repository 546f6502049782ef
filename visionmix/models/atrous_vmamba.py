"""AtrousVMamba: VMamba's skeleton with scans through atrous windows.

Source: AtrousMamba (Wang et al. 2025, arXiv 2507.16172), which has neither public code nor weights. From the paper: a
selective scan in windows sampled at atrous rates, which expands the range step by step, on VMamba's skeleton. Decided
here: windows of 7x7 cells, which tile every stage's map at 224 pixels, at rates 1, 2, 1, 2, ... of a stage's blocks (1
alone in the last stage, whose map is one window); widths and depths of VMamba's releases. The mixer is
`visionmix.mixers.AtrousScan`.
"""

from typing import Any

from torch import nn

from visionmix.backbones import Hierarchical
from visionmix.layers import mlp
from visionmix.models.family import Variant, register_family
from visionmix.models.weights import KeyMap

_WIDENING = {"cycle": [{"name": "atrous_scan", "rate": 1}, {"name": "atrous_scan", "rate": 2}]}
_MIXERS = [_WIDENING, _WIDENING, _WIDENING, {"name": "atrous_scan", "rate": 1}]


def _variant(depth: int, dim: int = 96, **options: Any) -> Variant:
    sizes = {"embed_dims": tuple(dim << stage for stage in range(4)), "depths": (2, 2, depth, 2)}
    return Variant(Hierarchical, {"mixer": _MIXERS, "mlp_layer": mlp} | sizes | options)


VARIANTS = {
    "atrous_vmamba_tiny": _variant(8),
    "atrous_vmamba_small": _variant(20),
    "test_atrous_vmamba": _variant(2, 16, img_size=96, depths=(2, 1, 2, 1)),
}


def key_map(model: nn.Module) -> KeyMap:
    """Return the map of files under the model's own names: there are no published ones."""
    return KeyMap()


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2507.16172", license="apache-2.0")

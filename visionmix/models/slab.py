"""SLAB: simplified linear attention, and batch norms instead of all layer norms, in Swin, PVT and DeiT.

Source: SLAB (Guo et al. 2024, arXiv 2405.11582). `slab_*` have `visionmix.mixers.SimplifiedLinearAttention` in every
block, the Swins in those of their first two stages; they begin training with layer norms and end it with batch norms
(`visionmix.layers.LinearNorm`). `swin_tiny_prepbn` and `deit_tiny_prepbn` have softmax attention and the latter norms
throughout (`visionmix.layers.RepBN`). ``timm.utils.reparameterize_model(model)`` folds the norms away for inference.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from visionmix.layers import LinearNorm, RepBN
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import deit, pvt, swin

_KEYS = KeyMap(
    rename=[(r"\.positional_encoding$", ".pos_embed.weight"), (r"\.dwc\.", ".lepe.")],
    drop={r"\.(warm|iter|total_step)$": "counters of forward passes, which set the schedule; a trainer tells it here"},
    reshape=True,
)
_UNUSED_TOKEN = KeyMap(drop={r"^cls_token$": "the published model has a class token and never puts it in"})


def _swin(
    depths: Sequence[int],
    letters: str = "LLSS",
    norm: Callable[..., nn.Module] = LinearNorm,
    dim: int = 96,
    heads: int = 3,
) -> Layout:
    return swin.swin(dim, depths, heads, letters, lambda stage: "simplified", norm_layer=norm).with_keys(_KEYS)


def _pvt(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> Layout:
    norm = partial(LinearNorm, share=0.8, eps=1e-6)
    return pvt.pvt(dims, depths, "simplified", norm_layer=norm).with_keys(_KEYS)


def _deit(dim: int, heads: int, depth: int = 12, **options: Any) -> Layout:
    """Return the layout of DeiT with the mean of the cells instead of a class token."""
    norm = partial(LinearNorm, eps=1e-6)
    layout = deit.deit(dim, heads, ["simplified"] * depth)
    layout = layout.with_options(prefix_tokens=None, global_pool="avg", norm_layer=norm, **options)
    # All rows of the file's position embedding are cells.
    return replace(layout, keys=replace(layout.keys, transform=None) + _KEYS + _UNUSED_TOKEN)


def _deit_prepbn(dim: int, heads: int) -> Layout:
    return deit.deit(dim, heads, ["softmax"] * 12).with_options(norm_layer=RepBN)


def _in1k(name: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"https://github.com/xinghaochen/SLAB/releases/download/ckpts/{name}.pth", top1=top1)}


VARIANTS = {
    "slab_swin_tiny": Variant(_swin((2, 2, 6, 2)), _in1k("slab_swin_tiny", 81.8)),
    "slab_swin_small": Variant(_swin((2, 2, 18, 2)), _in1k("slab_swin_small", 83.6)),
    "slab_pvt_tiny": Variant(_pvt((2, 2, 2, 2)), _in1k("slab_pvt_tiny", 76.5)),
    "slab_deit_tiny": Variant(_deit(192, 3), _in1k("slab_deit_tiny", 74.3)),
    "swin_tiny_prepbn": Variant(_swin((2, 2, 6, 2), "SSSS", RepBN), _in1k("swin_tiny_prepbn", 81.4)),
    "deit_tiny_prepbn": Variant(_deit_prepbn(192, 3), _in1k("deit_tiny_prepbn", 73.6)),
    "test_slab_swin": Variant(_swin((1, 1, 2, 1), dim=16, heads=1).with_options(img_size=96)),
    "test_slab_pvt": Variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64)).with_options(img_size=96)),
    "test_slab_deit": Variant(_deit(32, 2, depth=3, img_size=96)),
    "test_swin_prepbn": Variant(_swin((1, 1, 2, 1), "SSSS", RepBN, 16, 1).with_options(img_size=96)),
}

register_family(__name__, VARIANTS, paper="arXiv 2405.11582")

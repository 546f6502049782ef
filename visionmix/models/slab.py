"""SLAB: simplified linear attention, and batch norms instead of all layer norms, in Swin, CSWin, PVT and DeiT.

Source: SLAB (Guo et al. 2024, arXiv 2405.11582). `slab_*` have `visionmix.mixers.SimplifiedLinearAttention` in every
block, the Swins and CSWins in those of their first two stages; `*_prepbn` have softmax attention, the PVTs to smaller
maps (`visionmix.mixers.SpatialReductionAttention`). All begin training with layer norms and end it with batch norms
(`visionmix.layers.LinearNorm`), but for `swin_tiny_prepbn` and `deit_tiny_prepbn`, which have the latter throughout
(`visionmix.layers.RepBN`). ``timm.utils.reparameterize_model(model)`` folds the norms away for inference.

The published training ends with ten passes over the images that renew the batch norms' statistics alone; the recipes
here leave them out.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from visionmix.layers import LinearNorm, RepBN
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import cswin, deit, pvt, swin, with_norm

_KEYS = KeyMap(
    rename=[(r"\.positional_encoding$", ".pos_embed.weight"), (r"\.dwc\.", ".lepe.")],
    drop={r"\.(warm|iter|total_step)$": "counters of forward passes, which set the schedule; a trainer tells it here"},
    reshape=True,
)
_UNUSED_SCALE = KeyMap(drop={r"\.attns\.0\.scale$": "the published CSWin has scales of focused attention, unused"})
_UNUSED_TOKEN = KeyMap(drop={r"^cls_token$": "the published model has a class token and never puts it in"})
# Elsewhere q, k and v are one projection, which the host joins; here k and v are those of the smaller map.
_SMALLER_MAPS = KeyMap(rename=[(r"^(stages\.[012]\.blocks\.\d+\.mixer)\.kv\.", r"\1.sr_kv.")])


def _fading(passes: int, batch: int = 1024, epochs: int = 300, eps: float = 1e-5) -> Callable[..., nn.Module]:
    """Return what makes the norms whose layer norm has faded after so many training steps of the published run."""
    return partial(LinearNorm, share=round(passes / (1281167 // batch * epochs), 3), eps=eps)


def _swin(depths: Sequence[int], letters: str, norm: Callable[..., nn.Module], dim: int = 96, heads: int = 3) -> Layout:
    layout = swin.swin(dim, depths, heads, letters, lambda stage: "simplified")
    return with_norm(layout, norm).with_keys(_KEYS)


def _cswin(depths: Sequence[int], dim: int = 64) -> Layout:
    layout = cswin.cswin(dim, depths, 2, "LLSS", lambda stage: {"name": "simplified", "lepe": True})
    return with_norm(layout, _fading(120000, batch=2048, epochs=310)).with_keys(_KEYS + _UNUSED_SCALE)


def _pvt_norm(batch: int) -> Callable[..., nn.Module]:
    return _fading(300000, batch, epochs=310, eps=1e-6)


def _pvt(depths: Sequence[int], batch: int, dims: Sequence[int] = (64, 128, 320, 512)) -> Layout:
    return with_norm(pvt.pvt(dims, depths, "simplified"), _pvt_norm(batch)).with_keys(_KEYS)


def _pvt_prepbn(depths: Sequence[int], batch: int, dims: Sequence[int] = (64, 128, 320, 512)) -> Layout:
    norm = _pvt_norm(batch)
    mixers = [{"name": "spatial_reduction", "sr_ratio": ratio, "norm_layer": norm} for ratio in (8, 4, 2)]
    return with_norm(pvt.pvt(dims, depths, [*mixers, "softmax"]), norm).with_keys(_KEYS + _SMALLER_MAPS)


def _deit(dim: int, heads: int, depth: int = 12, **options: Any) -> Layout:
    """Return the layout of DeiT with the mean of the cells instead of a class token."""
    layout = deit.deit(dim, heads, ["simplified"] * depth)
    norm = _fading(60000, eps=1e-6)
    layout = layout.with_options(prefix_tokens=None, global_pool="avg", norm_layer=norm, **options)
    # All rows of the file's position embedding are cells.
    return replace(layout, keys=replace(layout.keys, transform=None) + _KEYS + _UNUSED_TOKEN)


def _deit_prepbn(dim: int, heads: int, norm: Callable[..., nn.Module]) -> Layout:
    return deit.deit(dim, heads, ["softmax"] * 12).with_options(norm_layer=norm).with_keys(_KEYS)


def _in1k(name: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"https://github.com/xinghaochen/SLAB/releases/download/ckpts/{name}.pth", top1=top1)}


_SWIN_NORM = _fading(60000)

VARIANTS = {
    "slab_swin_tiny": Variant(_swin((2, 2, 6, 2), "LLSS", _SWIN_NORM), _in1k("slab_swin_tiny", 81.8)),
    "slab_swin_small": Variant(_swin((2, 2, 18, 2), "LLSS", _SWIN_NORM), _in1k("slab_swin_small", 83.6)),
    "slab_cswin_tiny": Variant(_cswin((2, 4, 18, 1)), _in1k("slab_cswin_tiny", 82.8)),
    "slab_pvt_tiny": Variant(_pvt((2, 2, 2, 2), batch=1024), _in1k("slab_pvt_tiny", 76.5)),
    "slab_pvt_small": Variant(_pvt((3, 4, 6, 3), batch=512)),
    "slab_pvt_medium": Variant(_pvt((3, 4, 18, 3), batch=512)),
    "slab_deit_tiny": Variant(_deit(192, 3), _in1k("slab_deit_tiny", 74.3)),
    "slab_deit_small": Variant(_deit(384, 6), _in1k("slab_deit_small", 80.0)),
    "swin_tiny_prepbn": Variant(_swin((2, 2, 6, 2), "SSSS", RepBN), _in1k("swin_tiny_prepbn", 81.4)),
    "pvt_tiny_prepbn": Variant(_pvt_prepbn((2, 2, 2, 2), batch=1024), _in1k("pvt_tiny_prepbn", 76.0)),
    "pvt_small_prepbn": Variant(_pvt_prepbn((3, 4, 6, 3), batch=512), _in1k("pvt_small_prepbn", 80.1)),
    "pvt_medium_prepbn": Variant(_pvt_prepbn((3, 4, 18, 3), batch=1024), _in1k("pvt_medium_prepbn", 81.7)),
    "deit_tiny_prepbn": Variant(_deit_prepbn(192, 3, RepBN), _in1k("deit_tiny_prepbn", 73.6)),
    "deit_small_prepbn": Variant(_deit_prepbn(384, 6, _fading(300000, eps=1e-6)), _in1k("deit_small_prepbn", 80.2)),
    "test_slab_swin": Variant(_swin((1, 1, 2, 1), "LLSS", _SWIN_NORM, dim=16, heads=1).with_options(img_size=96)),
    "test_slab_cswin": Variant(_cswin((1, 1, 1, 1), dim=16).with_options(img_size=96)),
    "test_slab_pvt": Variant(_pvt((1, 1, 2, 1), batch=1024, dims=(8, 16, 40, 64)).with_options(img_size=96)),
    "test_slab_deit": Variant(_deit(32, 2, depth=3, img_size=96)),
    "test_swin_prepbn": Variant(_swin((1, 1, 2, 1), "SSSS", RepBN, 16, 1).with_options(img_size=96)),
    "test_pvt_prepbn": Variant(_pvt_prepbn((1, 1, 1, 1), 1024, (8, 16, 40, 64)).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2405.11582",
    paper_name="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
    "Normalization",
)

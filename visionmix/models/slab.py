"""SLAB: simplified linear attention and batch norms in the place of all layer norms, in Swin.

Source: SLAB (Guo et al. 2024, arXiv 2405.11582). The mixer is `visionmix.mixers.SimplifiedLinearAttention`, in the
first two stages. `slab_*` begin training with layer norms and end it with batch norms (`visionmix.layers.LinearNorm`);
`swin_tiny_prepbn`, which has softmax attention alone, has the latter throughout (`visionmix.layers.RepBN`).
``timm.utils.reparameterize_model(model)`` folds them away for inference.
"""

from collections.abc import Callable, Sequence

from torch import nn

from visionmix.layers import LinearNorm, RepBN
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import swin

_KEYS = KeyMap(
    rename=[(r"\.positional_encoding$", ".pos_embed.weight"), (r"\.dwc\.", ".lepe.")],
    drop={r"\.(warm|iter|total_step)$": "counters of forward passes, which set the schedule; a trainer tells it here"},
    reshape=True,
)


def _swin(
    depths: Sequence[int],
    letters: str = "LLSS",
    norm: Callable[..., nn.Module] = LinearNorm,
    dim: int = 96,
    heads: int = 3,
) -> Layout:
    return swin.swin(dim, depths, heads, letters, lambda stage: "simplified", norm_layer=norm).with_keys(_KEYS)


def _in1k(name: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(f"https://github.com/xinghaochen/SLAB/releases/download/ckpts/{name}.pth", top1=top1)}


VARIANTS = {
    "slab_swin_tiny": Variant(_swin((2, 2, 6, 2)), _in1k("slab_swin_tiny", 81.8)),
    "slab_swin_small": Variant(_swin((2, 2, 18, 2)), _in1k("slab_swin_small", 83.6)),
    "swin_tiny_prepbn": Variant(_swin((2, 2, 6, 2), "SSSS", RepBN), _in1k("swin_tiny_prepbn", 81.4)),
    "test_slab_swin": Variant(_swin((1, 1, 2, 1), dim=16, heads=1).with_options(img_size=96)),
    "test_swin_prepbn": Variant(_swin((1, 1, 2, 1), "SSSS", RepBN, 16, 1).with_options(img_size=96)),
}

register_family(__name__, VARIANTS, paper="arXiv 2405.11582")

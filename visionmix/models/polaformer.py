"""PolaFormer: linear attention that keeps the signs of queries and keys apart, in PVT and Swin.

Source: PolaFormer (Meng et al. 2025, arXiv 2501.15061). The models differ from their hosts by a table only; the mixer
is `visionmix.mixers.PolarityAwareLinearAttention`, which the PVTs have in every stage, the Swins in the first two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import pvt, swin
from visionmix.models.keys import Join

_KEYS = KeyMap(
    rename=[
        (r"\.positional_encoding$", ".pos_embed.weight"),
        (r"\.dwc\.", ".lepe."),
        (r"\.qkvg\.", ".qkv."),
    ],
    reshape=True,
)


def _qkvg(parts: Sequence[Tensor]) -> Tensor:
    """Return the projection to q, k, v and the gate of those to q and gate and to k and v."""
    q, gate = parts[0].chunk(2)
    return torch.cat([q, parts[1], gate])


_PVT_KEYS = KeyMap(
    drop={r"^norm\.": "the published PVT has a last norm and never calls it"}, join=[Join(("qg", "kv"), "qkv", _qkvg)]
)


def _pvt(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> Layout:
    return pvt.pvt(dims, depths, "polarity").with_keys(_KEYS + _PVT_KEYS)


def _swin(dim: int, depths: Sequence[int], heads: int) -> Layout:
    return swin.swin(dim, depths, heads, "LLSS", lambda stage: "polarity").with_keys(_KEYS)


def _in1k(top1: float) -> dict[str, Weights]:
    # The authors' data/build.py resizes test images to a square, before it cuts out the centre.
    return {"in1k": Weights(page="https://huggingface.co/ZachMeng/PolaFormer", top1=top1, crop_mode="squash")}


VARIANTS = {
    "polaformer_pvt_tiny": Variant(_pvt((2, 2, 2, 2)), _in1k(78.8)),
    "polaformer_pvt_small": Variant(_pvt((3, 4, 6, 3)), _in1k(81.9)),
    "polaformer_swin_tiny": Variant(_swin(96, (2, 2, 6, 2), 3), _in1k(82.6)),
    "polaformer_swin_small": Variant(_swin(96, (2, 2, 18, 2), 3), _in1k(83.6)),
    "polaformer_swin_base": Variant(_swin(128, (2, 2, 18, 2), 4), _in1k(83.8)),
    "test_polaformer_pvt": Variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64)).with_options(img_size=96)),
    "test_polaformer_swin": Variant(_swin(16, (1, 1, 2, 1), 1).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2501.15061",
    paper_name="PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
)

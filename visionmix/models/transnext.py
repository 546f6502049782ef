"""TransNeXt: attention to neighbours and a pooled map in one softmax, in the pyramid of PVTv2.

Source: TransNeXt (Shi 2023, arXiv 2311.17132). The mixers are `visionmix.mixers.AggregatedAttention` and, in the last
stage, `visionmix.mixers.LengthScaledCosineAttention`. Distances are counted in the maps of pre-training, whatever the
size of the images, as its author has it for fine-tuning at 384 pixels and for "extrapolation" in segmentation. The
published classifier takes square images alone, whose sides are multiples of 32; here any size runs.
"""

from collections.abc import Sequence
from functools import partial

from visionmix.layers import ConvGlu
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts import pvt

_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.q\.", ".mixer.query."),
        (r"\.mixer\.kv\.", ".mixer.key_value."),
        (r"\.mixer\.sr\.", ".mixer.pool_proj."),
        (r"\.mixer\.norm\.", ".mixer.pool_norm."),
        (r"\.cpb_fc(\d)\.", r".position_bias.fc\1."),
        (r"\.relative_pos_bias_local$", ".local_bias"),
        (r"\.learnable_tokens$", ".local_tokens"),
        (r"\.learnable_bias$", ".local_weights"),
    ],
    reshape=True,
)
_RATIOS = (8, 8, 4, 4)


def _transnext(
    dim: int,
    depths: Sequence[int],
    pool_ratios: Sequence[int | None] = (8, 4, 2, None),
    heads: int | None = None,
    pretrain_size: int = 224,
) -> Layout:
    """Return the layout; a stage whose pool ratio is None attends to all tokens, without neighbours."""
    heads = heads or dim // 24
    sides = [pretrain_size // (4 << stage) for stage in range(4)]
    mixers = [
        {"name": "length_scaled_cosine", "grid_size": (side, side)}
        if ratio is None
        else {"name": "aggregated", "grid_size": (side, side), "pool_ratio": ratio}
        for side, ratio in zip(sides, pool_ratios, strict=True)
    ]
    dims, num_heads = ([each << stage for stage in range(4)] for each in (dim, heads))
    layout = pvt.pvt_v2(dims, depths, mixers, num_heads).with_keys(_KEYS)
    return layout.with_options(mlp_layer=[partial(ConvGlu, mlp_ratio=ratio) for ratio in _RATIOS])


def _weights(name: str, top1: float, **facts) -> Weights:
    return Weights(hf_hub_id=f"DaiShiResearch/{name}", file=f"{name.replace('-', '_')}.pth", top1=top1, **facts)


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": _weights(f"transnext-{size}-224-1k", top1)}


def _in1k_384(size: str, top1: float, gmacs: float) -> dict[str, Weights]:
    # At 384 pixels the authors' datasets.py resizes test images to a square and cuts nothing off.
    name, facts = f"transnext-{size}-384-1k-ft-1k", {"crop_pct": 1.0, "crop_mode": "squash"}
    return {"in1k_384": _weights(name, top1, input_size=384, gmacs=gmacs, **facts)}


_AAAA = {"in1k": _weights("transnext-micro-AAAA-256-1k", 82.6, crop_pct=0.875)}

VARIANTS = {
    "transnext_micro": Variant(_transnext(48, (2, 2, 15, 2)), _in1k("micro", 82.5), 12.8, 2.7),
    "transnext_micro_aaaa": Variant(
        _transnext(48, (2, 2, 15, 2), (16, 8, 4, 2), pretrain_size=256).with_options(img_size=256), _AAAA, 13.1, 3.3
    ),
    "transnext_tiny": Variant(_transnext(72, (2, 2, 15, 2)), _in1k("tiny", 84.0), 28.2, 5.7),
    "transnext_small": Variant(
        _transnext(72, (5, 5, 22, 5)), _in1k("small", 84.7) | _in1k_384("small", 86.0, 32.1), 49.7, 10.3
    ),
    "transnext_base": Variant(
        _transnext(96, (5, 5, 23, 5)), _in1k("base", 84.8) | _in1k_384("base", 86.2, 56.3), 89.7, 18.4
    ),
    "test_transnext": Variant(_transnext(8, (1, 1, 2, 1), heads=1, pretrain_size=96).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2311.17132",
    paper_name="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    license="apache-2.0",
)

"""RAVLT: rank-augmented linear attention in its first stages, softmax attention in its later ones.

Source: RALA (Fan et al. 2024, arXiv 2411.07635). The mixer is `visionmix.mixers.RankAugmentedLinearAttention`.
"""

from visionmix.models import Variant, Weights, register_family
from visionmix.models.hosts.mavit import BASE, LARGE, SMALL, TEST, TINY, mavit


def _in1k(size: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id="aldjalkdf/RAVLT", file=f"RAVLT_{size}.pth", top1=top1)}


VARIANTS = {
    "ravlt_tiny": Variant(mavit("rala", TINY, 1024), _in1k("T", 82.8), 15, 2.4),
    "ravlt_small": Variant(mavit("rala", SMALL, 1024), _in1k("S", 84.4), 26, 4.6),
    "ravlt_base": Variant(mavit("rala", BASE, 1024), _in1k("B", 85.5), 48, 9.9),
    "ravlt_large": Variant(mavit("rala", LARGE, 1024), _in1k("L", 85.8), 95, 16.0),
    "test_ravlt": Variant(mavit("rala", TEST, 48, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2411.07635",
    paper_name="Breaking the Low-Rank Dilemma of Linear Attention",
    license="mit",
)

"""MAViT: magnitude-aware linear attention in its first stages, softmax attention in its later ones.

Source: MALA (Fan et al. 2025, arXiv 2507.00698). The mixer is `visionmix.mixers.MagnitudeAwareLinearAttention`.
"""

from visionmix.models import Variant, Weights, register_family
from visionmix.models.hosts.mavit import BASE, LARGE, SMALL, TEST, TINY, mavit


def _in1k(size: str, top1: float | None = None) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id="aldjalkdf/MAViT", file=f"MAViT_{size}.pth", top1=top1)}


VARIANTS = {
    "mavit_tiny": Variant(mavit("mala", TINY, 2048), _in1k("T")),
    "mavit_small": Variant(mavit("mala", SMALL, 2048), _in1k("S", 84.7)),
    "mavit_base": Variant(mavit("mala", BASE, 2048), _in1k("B")),
    "mavit_large": Variant(mavit("mala", LARGE, 2560), _in1k("L")),
    "test_mavit": Variant(mavit("mala", TEST, 48, img_size=96)),
}

register_family(
    __name__, VARIANTS, paper="arXiv 2507.00698", paper_name="Rectifying Magnitude Neglect in Linear Attention"
)

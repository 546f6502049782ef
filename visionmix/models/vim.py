"""Vim: a class token in the middle of the patches, and Mamba from both ends.

Source: Vim (Zhu et al. 2024, arXiv 2401.09417), the released weights with the class token in the middle; `_stride8` are
its models of overlapping patches (Vim-Ti+, Vim-S+). The mixer is `visionmix.mixers.BidirectionalMamba`.
"""

from visionmix.models import Variant, Weights, register_family
from visionmix.models.hosts.vim import vim


def _in1k(size: str, file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(hf_hub_id=f"hustvl/Vim-{size}-midclstok", file=file, top1=top1)}


VARIANTS = {
    "vim_tiny": Variant(vim(192), _in1k("tiny", "vim_t_midclstok_76p1acc.pth", 76.1), 7),
    "vim_small": Variant(vim(384), _in1k("small", "vim_s_midclstok_80p5acc.pth", 80.5), 26),
    "vim_base": Variant(vim(768), _in1k("base", "vim_b_midclstok_81p9acc.pth", 81.9), 98),
    "vim_tiny_stride8": Variant(vim(192, stride=8), _in1k("tiny", "vim_t_midclstok_ft_78p3acc.pth", 78.3), 7),
    "vim_small_stride8": Variant(vim(384, stride=8), _in1k("small", "vim_s_midclstok_ft_81p6acc.pth", 81.6), 26),
    "test_vim_tiny": Variant(vim(32, depth=3, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2401.09417",
    paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    license="apache-2.0",
)

"""AtrousVMamba: VMamba's skeleton with scans through atrous windows.

Source: AtrousMamba (Wang et al. 2025, arXiv 2507.16172), which has neither public code nor weights. From the paper: a
selective scan in windows sampled at atrous rates, which expands the range step by step, on VMamba's skeleton. Decided
here: windows of 7x7 cells, which tile every stage's map at 224 pixels, at rates 1, 2, 1, 2, ... of a stage's blocks (1
alone in the last stage, whose map is one window); widths and depths of VMamba's releases. The mixer is
`visionmix.mixers.AtrousScan`.
"""

from visionmix.models import Variant, register_family
from visionmix.models.hosts.vmamba import vmamba

_WIDENING = {"cycle": [{"name": "atrous_scan", "rate": 1}, {"name": "atrous_scan", "rate": 2}]}
_MIXERS = [_WIDENING, _WIDENING, _WIDENING, {"name": "atrous_scan", "rate": 1}]

VARIANTS = {
    "atrous_vmamba_tiny": Variant(vmamba(96, (2, 2, 8, 2), _MIXERS)),
    "atrous_vmamba_small": Variant(vmamba(96, (2, 2, 20, 2), _MIXERS)),
    "test_atrous_vmamba": Variant(vmamba(16, (2, 1, 2, 1), _MIXERS, img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2507.16172",
    # The paper spells its title so.
    paper_name="AtrousMamaba: An Atrous-Window Scanning Visual State Space Model for Remote Sensing Change Detection",
    license="apache-2.0",
)

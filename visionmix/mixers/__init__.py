"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name."""

from visionmix.mixers.bidirectional_mamba import BidirectionalMamba
from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.gated_linear_attention import GatedLinearAttention
from visionmix.mixers.multi_scale_scan import MultiScaleScan
from visionmix.mixers.plain_scan import PlainScan
from visionmix.mixers.registry import create_mixer, list_mixers, register_mixer
from visionmix.mixers.softmax import SoftmaxAttention

__all__ = [
    "BidirectionalMamba",
    "CrossScan",
    "GatedLinearAttention",
    "MultiScaleScan",
    "PlainScan",
    "SoftmaxAttention",
    "create_mixer",
    "list_mixers",
    "register_mixer",
]

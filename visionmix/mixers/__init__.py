"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name."""

from visionmix.mixers.agent import AgentAttention
from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.cross_window import CrossWindowAttention
from visionmix.mixers.focused import FocusedLinearAttention
from visionmix.mixers.gated_linear_attention import GatedLinearAttention
from visionmix.mixers.multi_scale_scan import MultiScaleScan
from visionmix.mixers.registry import create_mixer, list_mixers, register_mixer
from visionmix.mixers.softmax import SoftmaxAttention
from visionmix.mixers.window import WindowAttention

__all__ = [
    "AgentAttention",
    "CrossScan",
    "CrossWindowAttention",
    "FocusedLinearAttention",
    "GatedLinearAttention",
    "MultiScaleScan",
    "SoftmaxAttention",
    "WindowAttention",
    "create_mixer",
    "list_mixers",
    "register_mixer",
]

"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name."""

from visionmix.mixers.agent import AgentAttention
from visionmix.mixers.atrous_scan import AtrousScan
from visionmix.mixers.bidirectional_mamba import BidirectionalMamba
from visionmix.mixers.conv import DepthwiseConv
from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.cross_window import CrossWindowAttention
from visionmix.mixers.efficient_scan import EfficientScan, InvertedResidualMixer
from visionmix.mixers.focused import FocusedLinearAttention
from visionmix.mixers.gated_linear_attention import GatedLinearAttention
from visionmix.mixers.linear import LinearAttention, MagnitudeAwareLinearAttention, RankAugmentedLinearAttention
from visionmix.mixers.local_scan import LocalScan
from visionmix.mixers.multi_head_scan import MultiHeadScan
from visionmix.mixers.multi_scale_scan import MultiScaleScan
from visionmix.mixers.neighborhood import (
    CircularNeighborhoodAttention,
    DilatedNeighborhoodAttention,
    NeighborhoodAttention,
)
from visionmix.mixers.plain_scan import PlainScan
from visionmix.mixers.registry import create_mixer, list_mixers, register_mixer
from visionmix.mixers.softmax import SoftmaxAttention
from visionmix.mixers.window import WindowAttention

__all__ = [
    "AgentAttention",
    "AtrousScan",
    "BidirectionalMamba",
    "CircularNeighborhoodAttention",
    "CrossScan",
    "CrossWindowAttention",
    "DepthwiseConv",
    "DilatedNeighborhoodAttention",
    "EfficientScan",
    "FocusedLinearAttention",
    "GatedLinearAttention",
    "InvertedResidualMixer",
    "LinearAttention",
    "LocalScan",
    "MagnitudeAwareLinearAttention",
    "MultiHeadScan",
    "MultiScaleScan",
    "NeighborhoodAttention",
    "PlainScan",
    "RankAugmentedLinearAttention",
    "SoftmaxAttention",
    "WindowAttention",
    "create_mixer",
    "list_mixers",
    "register_mixer",
]

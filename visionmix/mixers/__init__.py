"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name."""

from visionmix.mixers.atrous_scan import AtrousScan
from visionmix.mixers.bidirectional_mamba import BidirectionalMamba
from visionmix.mixers.conv import DepthwiseConv
from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.efficient_scan import EfficientScan, InvertedResidualMixer
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

__all__ = [
    "AtrousScan",
    "BidirectionalMamba",
    "CircularNeighborhoodAttention",
    "CrossScan",
    "DepthwiseConv",
    "DilatedNeighborhoodAttention",
    "EfficientScan",
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
    "create_mixer",
    "list_mixers",
    "register_mixer",
]

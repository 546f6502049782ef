"""Layers that several skeletons share: stems, downsamplers, feed-forwards, norms, embeddings, heads. Maps are NHWC."""

from visionmix.layers.conv import DepthwiseConvNormAct, SharedDepthwiseConv
from visionmix.layers.downsample import ConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ConvMlp, mlp, swiglu
from visionmix.layers.gate import ChannelGate, LogSigmoid, gated, projected, zero_token
from visionmix.layers.grid import Grid, PrefixTokens, join_prefix, prefix_positions, split_prefix
from visionmix.layers.head import ProjectionHead, TokenHead
from visionmix.layers.norm import BatchNorm, ScanLayerNorm, ScanRmsNorm
from visionmix.layers.padding import pad
from visionmix.layers.position import ConvPosition, PositionEmbedding, resample_position
from visionmix.layers.precision import at_least_float32, scan_dtype
from visionmix.layers.rep_norm import LinearNorm, RepBN
from visionmix.layers.rotary import RotaryMap
from visionmix.layers.selective_scan import SelectiveScan1d, SelectiveScan2d
from visionmix.layers.stem import Stem, StemConv, conv_stem, deep_conv_stem, deep_patch_stem, patch_stem

__all__ = [
    "BatchNorm",
    "ChannelGate",
    "ConvDownsample",
    "ConvMlp",
    "ConvPosition",
    "DepthwiseConvNormAct",
    "Grid",
    "LinearNorm",
    "LogSigmoid",
    "PatchMerging",
    "PositionEmbedding",
    "PrefixTokens",
    "ProjectionHead",
    "RepBN",
    "RotaryMap",
    "ScanLayerNorm",
    "ScanRmsNorm",
    "SelectiveScan1d",
    "SelectiveScan2d",
    "SharedDepthwiseConv",
    "Stem",
    "StemConv",
    "TokenHead",
    "at_least_float32",
    "conv_stem",
    "deep_conv_stem",
    "deep_patch_stem",
    "gated",
    "join_prefix",
    "mlp",
    "pad",
    "patch_stem",
    "prefix_positions",
    "projected",
    "resample_position",
    "scan_dtype",
    "split_prefix",
    "swiglu",
    "zero_token",
]

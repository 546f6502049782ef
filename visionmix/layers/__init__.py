"""What several skeletons share: stems, downsamplers, feed-forwards, norms, embeddings, heads. Maps are NHWC."""

from visionmix.layers.conv import DepthwiseConvNormAct
from visionmix.layers.downsample import ConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ConvMlp, mlp, swiglu
from visionmix.layers.gate import ChannelGate, LogSigmoid, gated, projected, zero_token
from visionmix.layers.grid import Grid, join_prefix, split_prefix
from visionmix.layers.head import ProjectionHead, TokenHead
from visionmix.layers.norm import BatchNorm, ScanLayerNorm, ScanRmsNorm
from visionmix.layers.padding import pad
from visionmix.layers.position import ClassToken, ConvPosition, PositionEmbedding, resample_position
from visionmix.layers.precision import at_least_float32, scan_dtype
from visionmix.layers.rotary import RotaryMap
from visionmix.layers.selective_scan import SelectiveScan1d, SelectiveScan2d
from visionmix.layers.stem import ConvStem, DeepConvStem, DeepPatchStem, PatchStem

__all__ = [
    "BatchNorm",
    "ChannelGate",
    "ClassToken",
    "ConvDownsample",
    "ConvMlp",
    "ConvPosition",
    "ConvStem",
    "DeepConvStem",
    "DeepPatchStem",
    "DepthwiseConvNormAct",
    "Grid",
    "LogSigmoid",
    "PatchMerging",
    "PatchStem",
    "PositionEmbedding",
    "ProjectionHead",
    "RotaryMap",
    "ScanLayerNorm",
    "ScanRmsNorm",
    "SelectiveScan1d",
    "SelectiveScan2d",
    "TokenHead",
    "at_least_float32",
    "gated",
    "join_prefix",
    "mlp",
    "pad",
    "projected",
    "resample_position",
    "scan_dtype",
    "split_prefix",
    "swiglu",
    "zero_token",
]

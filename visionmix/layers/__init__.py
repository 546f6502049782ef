"""What several skeletons share: stems, downsamplers, feed-forwards, norms, embeddings, heads. Maps are NHWC."""

from visionmix.layers.downsample import ConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ConvMlp, mlp, swiglu
from visionmix.layers.gate import LogSigmoid
from visionmix.layers.grid import Grid, join_prefix, split_prefix
from visionmix.layers.head import TokenHead
from visionmix.layers.norm import BatchNorm
from visionmix.layers.padding import pad
from visionmix.layers.position import ClassToken, PositionEmbedding, resample_position
from visionmix.layers.selective_scan import SelectiveScan2d
from visionmix.layers.stem import ConvStem, PatchStem

__all__ = [
    "BatchNorm",
    "ClassToken",
    "ConvDownsample",
    "ConvMlp",
    "ConvStem",
    "Grid",
    "LogSigmoid",
    "PatchMerging",
    "PatchStem",
    "PositionEmbedding",
    "SelectiveScan2d",
    "TokenHead",
    "join_prefix",
    "mlp",
    "pad",
    "resample_position",
    "split_prefix",
    "swiglu",
]

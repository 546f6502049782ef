"""What several skeletons share: stems, downsamplers, feed-forwards, position embeddings. Maps are NHWC."""

from visionmix.layers.downsample import ConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ConvMlp, mlp, swiglu
from visionmix.layers.gate import LogSigmoid
from visionmix.layers.position import PositionEmbedding, resample_position
from visionmix.layers.selective_scan import SelectiveScan2d
from visionmix.layers.stem import ConvStem, PatchStem

__all__ = [
    "ConvDownsample",
    "ConvMlp",
    "ConvStem",
    "LogSigmoid",
    "PatchMerging",
    "PatchStem",
    "PositionEmbedding",
    "SelectiveScan2d",
    "mlp",
    "resample_position",
    "swiglu",
]

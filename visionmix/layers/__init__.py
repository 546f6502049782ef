"""What several skeletons share: stems, downsamplers, feed-forwards, position embeddings. Maps are NHWC."""

from visionmix.layers.downsample import ConvDownsample
from visionmix.layers.feed_forward import swiglu
from visionmix.layers.position import PositionEmbedding, resample_position
from visionmix.layers.stem import ConvStem

__all__ = ["ConvDownsample", "ConvStem", "PositionEmbedding", "resample_position", "swiglu"]

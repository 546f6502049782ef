"""Layers that several skeletons share: stems, downsamplers, feed-forwards, norms, embeddings, heads.

Maps are NHWC: (batch, height, width, channels). The keywords ``**dd`` of constructors, here and in `visionmix.mixers`,
are `device` and `dtype` of the parameters, as everywhere in PyTorch.
"""

from visionmix.layers.bottleneck import Bottleneck, BottleneckStem
from visionmix.layers.conv import DepthwiseConvNormAct, OmniShift, SharedDepthwiseConv
from visionmix.layers.cross_scale import CrossScaleTokens
from visionmix.layers.deformable import DeformableConv
from visionmix.layers.downsample import ConvDownsample, ConvsDownsample, NormConvDownsample, PatchMerging
from visionmix.layers.feed_forward import ChannelMix, ConvGlu, ConvMlp, mlp, swiglu
from visionmix.layers.gate import ChannelGate, LogSigmoid
from visionmix.layers.grid import Grid, PrefixTokens, join_prefix, prefix_positions, split_prefix
from visionmix.layers.half_precision import at_least_float32, scaled, scaled_gate, scan_dtype, unscaled, zero_token
from visionmix.layers.head import CornerHead, ProjectionHead, TokenHead
from visionmix.layers.learnable_spacings import SpacedKernel
from visionmix.layers.maps import pad, pool_map, pool_windows, resample_map
from visionmix.layers.monarch import MonarchLinear, MonarchMlp
from visionmix.layers.multi_scale import MultiScalePatches
from visionmix.layers.norm import BatchNorm, OffsetLayerNorm, RmsNorm, ScanLayerNorm, ScanRmsNorm
from visionmix.layers.position import ConvPosition, PositionEmbedding
from visionmix.layers.rep_norm import LinearNorm, RepBN
from visionmix.layers.rotary import RotaryMap
from visionmix.layers.selective_scan import SelectiveScan1d, SelectiveScan2d, StateScan2d, scan_sizes
from visionmix.layers.sequence import GatedMixer, OrderedMixer, ScanMixer, SequenceMixer
from visionmix.layers.shift_add import PrimitiveMixture, ShiftLinear
from visionmix.layers.spatial_frequency import JointSpatialFrequency, PyramidFusion
from visionmix.layers.stem import Stem, StemConv, conv_stem, deep_conv_stem, deep_patch_stem, patch_stem

__all__ = [
    "BatchNorm",
    "Bottleneck",
    "BottleneckStem",
    "ChannelGate",
    "ChannelMix",
    "ConvDownsample",
    "ConvGlu",
    "ConvMlp",
    "ConvPosition",
    "ConvsDownsample",
    "CornerHead",
    "CrossScaleTokens",
    "DeformableConv",
    "DepthwiseConvNormAct",
    "GatedMixer",
    "Grid",
    "JointSpatialFrequency",
    "LinearNorm",
    "LogSigmoid",
    "MonarchLinear",
    "MonarchMlp",
    "MultiScalePatches",
    "NormConvDownsample",
    "OffsetLayerNorm",
    "OmniShift",
    "OrderedMixer",
    "PatchMerging",
    "PositionEmbedding",
    "PrefixTokens",
    "PrimitiveMixture",
    "ProjectionHead",
    "PyramidFusion",
    "RepBN",
    "RmsNorm",
    "RotaryMap",
    "ScanLayerNorm",
    "ScanMixer",
    "ScanRmsNorm",
    "SelectiveScan1d",
    "SelectiveScan2d",
    "SequenceMixer",
    "SharedDepthwiseConv",
    "ShiftLinear",
    "SpacedKernel",
    "StateScan2d",
    "Stem",
    "StemConv",
    "TokenHead",
    "at_least_float32",
    "conv_stem",
    "deep_conv_stem",
    "deep_patch_stem",
    "join_prefix",
    "mlp",
    "pad",
    "patch_stem",
    "pool_map",
    "pool_windows",
    "prefix_positions",
    "resample_map",
    "scaled",
    "scaled_gate",
    "scan_dtype",
    "scan_sizes",
    "split_prefix",
    "swiglu",
    "unscaled",
    "zero_token",
]

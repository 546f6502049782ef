"""Token mixers: maps (batch, height, width, channels) to the same shape, found by name."""

from visionmix.mixers.gated_linear_attention import GatedLinearAttention
from visionmix.mixers.registry import create_mixer, list_mixers, register_mixer

__all__ = ["GatedLinearAttention", "create_mixer", "list_mixers", "register_mixer"]

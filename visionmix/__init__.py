"""Efficient vision backbones and token mixers; importing registers every model with timm."""

from visionmix import models
from visionmix.mixers import create_mixer, list_mixers

__all__ = ["create_mixer", "list_mixers", "models"]

__version__ = "0.1.0"

"""Efficient vision backbones and token mixers; importing registers every model with timm."""

from visionmix import adaptive, kernels, models, reduction, scans
from visionmix.mixers import create_mixer, list_mixers
from visionmix.models import list_models

__all__ = ["adaptive", "create_mixer", "kernels", "list_mixers", "list_models", "models", "reduction", "scans"]

__version__ = "0.1.0"

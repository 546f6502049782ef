"""Adaptive computation: models that spend on each token as much of a layer's width as it needs."""

from visionmix.adaptive.conversion import convert, modules, set_learners
from visionmix.adaptive.gating import GatingNetwork
from visionmix.adaptive.module import ACM, SplitACM

__all__ = ["ACM", "GatingNetwork", "SplitACM", "convert", "modules", "set_learners"]

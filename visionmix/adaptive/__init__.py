"""Adaptive computation: models that spend on each token as much of a layer's width as it needs.

`convert` makes such a model from a trained one; `distillation_losses`, `routing_losses` and `finetuning_losses` train
it; `usage` says what it spends. docs/adaptive.md has an example.
"""

from visionmix.adaptive.conversion import convert, modules, set_learners
from visionmix.adaptive.gating import GatingNetwork
from visionmix.adaptive.losses import (
    budget_loss,
    distillation_loss,
    diversity_loss,
    entropy_loss,
    routing_loss,
    routing_targets,
)
from visionmix.adaptive.module import ACM, SplitACM
from visionmix.adaptive.observing import Usage, usage
from visionmix.adaptive.training import distillation_losses, finetuning_losses, in_phase, routing_losses

__all__ = [
    "ACM",
    "GatingNetwork",
    "SplitACM",
    "Usage",
    "budget_loss",
    "convert",
    "distillation_loss",
    "distillation_losses",
    "diversity_loss",
    "entropy_loss",
    "finetuning_losses",
    "in_phase",
    "modules",
    "routing_loss",
    "routing_losses",
    "routing_targets",
    "set_learners",
    "usage",
]

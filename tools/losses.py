"""The loss of the labels, by a recipe."""

import timm
import torch
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy, JsdCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from visionmix.tools.recipe_keys import Recipe


class _NoLabels(nn.Module):
    """Zero for any outputs and targets: the model's own losses stand alone."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs.new_zeros(())


def criterion(recipe: Recipe) -> nn.Module:
    """Return the loss of logits and targets.

    Targets are class indices, soft (batch, classes) where mixup or CutMix is on, and 0 or 1 for each label with
    `data.multilabel`, in which smoothing moves them towards 0.5. Without `data.labels` the loss is 0.

    Raises:
        ValueError: timm is too old to smooth the labels of such images.
    """
    wanted = recipe.train
    if not recipe.data.labels:
        return _NoLabels()
    if recipe.data.multilabel:
        return _of_several_labels(recipe)
    soft = bool(recipe.augment.mixup or recipe.augment.cutmix)  # then the targets come smoothed
    if wanted.loss == "bce":
        return BinaryCrossEntropy(
            smoothing=0.0 if soft else wanted.label_smoothing,
            target_threshold=wanted.bce_target_threshold,
            sum_classes=wanted.bce_sum,
        )
    if wanted.loss == "jsd":
        return JsdCrossEntropy(recipe.augment.splits, smoothing=wanted.label_smoothing)
    return SoftTargetCrossEntropy() if soft else nn.CrossEntropyLoss(label_smoothing=wanted.label_smoothing)


def _of_several_labels(recipe: Recipe) -> nn.Module:
    wanted = recipe.train
    try:
        if wanted.loss == "asymmetric":
            return AsymmetricLossMultiLabel(smoothing=wanted.label_smoothing)
        return BinaryCrossEntropy(
            smoothing=wanted.label_smoothing,
            target_threshold=wanted.bce_target_threshold,
            sum_classes=wanted.bce_sum,
            smooth_dense=True,
        )
    except TypeError as error:
        raise ValueError(f"data.multilabel=True needs a newer timm than {timm.__version__}: {error}") from error

"""What a model is trained to match besides the labels: a teacher's logits, features or guesses, or its own average."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from visionmix.tools import models
from visionmix.tools.recipe_keys import Recipe


def full(values: torch.Tensor) -> torch.Tensor:
    """Return the values in float32 at least, in which losses are computed."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def divergence(logits: torch.Tensor, given: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over images of KL(softmax(given / temperature) || softmax(logits / temperature))."""
    ours, theirs = (F.log_softmax(full(values) / temperature, 1) for values in (logits, given))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Student(nn.Module):
    """From images to (logits, what is to match the teacher's output, losses of the model's own by name).

    Args:
        model: in training.
        kind: "features" to return pooled features, projected, for the teacher's; "tokens" for the logits of the model's
            second classifier; otherwise the logits are returned twice.
        projection: from the model's features to as many channels as the teacher's.
    """

    def __init__(self, model: nn.Module, kind: str | None = None, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.kind, self.projection = model, kind, projection

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Make one forward pass, by the model's `forward_train` if it has one."""
        if self.kind == "features":
            features = self.model.forward_features(images)
            pooled = self.model.forward_head(features, pre_logits=True)
            return self.model.forward_head(features), pooled if self.projection is None else self.projection(pooled), {}
        if hasattr(self.model, "forward_train"):
            logits, losses = self.model.forward_train(images)
        else:
            logits, losses = self.model(images), {}
        if self.kind == "tokens":
            return *logits, losses
        return logits, logits, losses


class Teacher:
    """A trained model that another one is to match.

    The losses are those of `timm.task`: Hinton's divergence of logits (2015, arXiv 1503.02531), the mean squared
    difference of pooled features, and DeiT's distillation token (Touvron et al. 2020, arXiv 2012.12877). The tasks
    themselves take their student's mean and std from its `pretrained_cfg`, where a recipe may have others, and leave no
    place for losses of the model's own.

    Args:
        recipe: of the run.
        given: the images that the student takes.
        classes: names, in the order of the student's outputs.
        device: of the student.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: there is no such model, it has other classes, or it does not take the student's images.
    """

    def __init__(self, recipe: Recipe, given: models.Input, classes: Sequence[str], device: torch.device) -> None:
        self.wanted = recipe.distill
        self.name = f"distill.teacher={self.wanted.teacher!r}"
        try:
            trained = models.load_trained(
                self.wanted.checkpoint,
                name=self.wanted.teacher,
                pretrained=self.wanted.checkpoint is None,
                image_size=given.image_size,
                device=device,
            )
        except ValueError as error:
            raise ValueError(f"{self.name}, distill.checkpoint={self.wanted.checkpoint!r}: {error}") from error
        self.model = trained.model.requires_grad_(False)
        if self.wanted.kind != "features":
            outputs = trained.outputs
            if outputs.count != len(classes):
                raise ValueError(
                    f"{self.name} has {outputs.count} outputs, and the data {len(classes)} classes; give a teacher of "
                    "these classes, or set distill.kind=features"
                )
            if outputs.own and list(outputs.labels) != list(classes):
                raise ValueError(
                    f"{self.name} was trained on other classes than those of the data folder; give a teacher of these "
                    "classes, or set distill.kind=features"
                )
        mean, std = (torch.tensor([getattr(given, part), getattr(trained.input, part)], device=device)[..., None, None]
                     for part in ("mean", "std"))  # fmt: skip
        self.scale, self.shift = std[0] / std[1], (mean[0] - mean[1]) / std[1]

    @property
    def num_features(self) -> int:
        """Channels of the features."""
        return feature_channels(self.model, self.name)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits, or its pooled features, for images that are normalised for the student."""
        images = images * self.scale + self.shift
        if self.wanted.kind == "features":
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model(images)

    def loss(self, matched: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return the weighted distance of the student's output from the teacher's."""
        wanted = self.wanted
        if wanted.kind == "features":
            loss = F.mse_loss(full(matched), full(given))
        elif wanted.hard:
            loss = F.cross_entropy(full(matched), given.argmax(1))
        else:
            loss = divergence(matched, given, wanted.temperature) * wanted.temperature**2
        return wanted.weight * loss


def feature_channels(model: nn.Module, name: str) -> int:
    """Return the channels of a model's pooled features; raises ValueError where it does not say them."""
    channels = getattr(model, "head_hidden_size", getattr(model, "num_features", None))
    if channels is None or not hasattr(model, "forward_head"):
        raise ValueError(f"{name} has no features that distill.kind=features could compare; set it to logits")
    return channels


def make_student(model: nn.Module, recipe: Recipe, teacher: Teacher | None) -> Student:
    """Return the model as the recipe's teacher teaches it.

    Raises:
        ValueError: the model has no features, no distillation token, or losses of its own that features leave out.
    """
    if teacher is None:
        return Student(model)
    kind, name = recipe.distill.kind, f"model {recipe.model.name!r}"
    if kind == "tokens":
        if not hasattr(model, "set_distilled_training"):
            raise ValueError(
                f"distill.kind='tokens' needs a model with a distillation token, e.g. deit_tiny_distilled_patch16_224; "
                f"{name} has none"
            )
        model.set_distilled_training(True)
    projection = None
    if kind == "features":
        if hasattr(model, "forward_train"):
            raise ValueError(f"distill.kind='features' leaves out the losses that {name} has of its own; take logits")
        channels = feature_channels(model, name), teacher.num_features
        if channels[0] != channels[1]:
            weight = next(model.parameters())
            projection = nn.Linear(*channels, device=weight.device, dtype=weight.dtype)
    return Student(model, kind, projection)

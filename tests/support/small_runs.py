"""Small training runs in memory, which take milliseconds a step."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from visionmix.tools import checkpoint, data, recipe, saving, train
from visionmix.tools.display import Display
from visionmix.tools.score import score
from visionmix.tools.trainer import Stop, Trainer

CPU = torch.device("cpu")
CLASSES = ["blue", "green", "red"]

# Nothing here draws a random number but the order of the images; a test turns on what it is about.
STILL = {
    "model": {"name": "small"},
    "data": {"image_size": 32, "batch_size": 4, "workers": 0, "crop_pct": 1.0},
    "augment": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": 0.0},
    "optimizer": {"lr": 2e-3, "lr_batch": None},
    "schedule": {"epochs": 5, "warmup_epochs": 1},
}


class Small(nn.Module):
    """A convolution, a norm and a classifier: trained in milliseconds."""

    def __init__(self, num_classes, width=8, batch_norm=False):
        super().__init__()
        self.in_chans = 3
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, width, width
        self.conv = nn.Conv2d(3, width, 8, 8)
        self.bn = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def get_classifier(self):
        return self.head

    def group_matcher(self, coarse=False):
        return {"stem": "^conv", "blocks": "^norm"}

    def forward_features(self, x):
        return nn.functional.gelu(self.bn(self.conv(x))).mean((2, 3))

    def forward_head(self, x, pre_logits=False):
        x = self.norm(x)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def make(tree: Path | None, **sections) -> recipe.Recipe:
    """Return STILL with these sections' options laid over it."""
    settings = copy.deepcopy(STILL)
    for section, options in sections.items():
        settings.setdefault(section, {}).update(options)
    if tree:
        settings["data"]["path"] = str(tree)
    return recipe.from_dict(settings, "test")


def begin(**sections) -> Trainer:
    """Return a trainer of 4 steps an epoch, without images."""
    return Trainer(make(None, **sections), CLASSES, 4, CPU)


def run(tree: Path, epochs: int, **sections) -> Trainer:
    """Train so many epochs and return the trainer."""
    trainer, loader, _ = train.make_run(make(tree, **sections), CLASSES, CPU)
    go_on(trainer, loader, epochs)
    return trainer


def go_on(trainer: Trainer, loader, epochs: int) -> None:
    for _ in range(epochs):
        loss, _ = trainer.train_epoch(loader, Display(5, trainer.steps, quiet=True), Stop())
        trainer.finish_epoch({"train_loss": loss, "test_top1": 0.0})


def save(path: Path, trainer: Trainer, loader=None) -> Path:
    """Write a checkpoint of the trainer and return its folder."""
    saver = saving.Saver(path.parent, lambda text, _: pytest.fail(text))
    saver.save(path.name, trainer.state(loader))
    saver.wait()
    return path


def last_of(run: Path) -> Path:
    """Return the last checkpoint in a run's folder."""
    return saving.newest(run / "checkpoints")[0]


def best_of(run: Path) -> Path:
    """Return the checkpoint of the best epoch in a run's folder."""
    row = max(checkpoint.read(last_of(run))["history"], key=score)
    return run / "checkpoints" / f"epoch_{row['epoch']:04d}"


def losses(trainer: Trainer) -> list[float]:
    return [row["train_loss"] for row in trainer.history]


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return data.Batch(images, torch.arange(size) % len(CLASSES), [], 0)


def steps(trainer: Trainer, count: int = 3) -> list[float]:
    return [trainer._update(batch(seed=seed)).item() for seed in range(count)]


VIT = {
    "model": {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3}}
}

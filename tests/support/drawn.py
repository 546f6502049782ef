"""Mixers whose parameters are all drawn at random, biases and positions too: none hides behind a 0 or a 1."""

from typing import Any

import torch
from torch import nn

from visionmix import create_mixer


def drawn_mixer(name: str, *, std: float = 0.3, **options: Any) -> nn.Module:
    """Return the mixer of 12 channels with `options`, its parameters normal numbers of this deviation."""
    torch.manual_seed(0)
    mixer = create_mixer(name, 12, **options)
    for value in mixer.parameters():
        nn.init.normal_(value, std=std)
    return mixer

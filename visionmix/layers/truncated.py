"""Initial weights of convolutions from a truncated normal, as linear layers have them."""

import torch
from timm.layers import trunc_normal_
from torch import nn


def draw_convolutions(module: nn.Module) -> None:
    """Draw the weights of the convolutions inside `module` from a truncated normal of deviation 0.02, their biases 0.

    Source: ConvNeXt's code (Liu et al. 2022, arXiv 2201.03545).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class DrawnConvolutions:
    """A base for modules, before `torch.nn.Module`, whose convolutions begin as `draw_convolutions` says."""

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw all convolutions inside."""
        draw_convolutions(self)

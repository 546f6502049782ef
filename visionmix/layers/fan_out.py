"""Initial weights by the number of outputs that an input reaches, for networks of convolutions."""

import math

from torch import nn


def draw_by_fan_out(layer: nn.Module) -> None:
    """Draw the weight of a convolution or linear layer from a normal of variance ``2 / fan_out``, its bias 0.

    The fan-out is the cells of the kernel times the output channels of a group. Any other layer stays as it is.

    Source: He et al. 2015, arXiv 1502.01852, as PVTv2's code (Wang et al. 2021, arXiv 2106.13797) has it.
    """
    if isinstance(layer, nn.Linear):
        fan_out = layer.out_features
    elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
    else:
        return
    nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

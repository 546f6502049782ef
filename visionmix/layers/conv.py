"""Convolutions between neighbours on NHWC maps."""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers.fold import fold_behind
from visionmix.layers.half_precision import at_least_float32


class DepthwiseConvNormAct(nn.Module):
    """``act(norm(conv(x)))`` with a depthwise convolution without bias and a batch normalisation.

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the kernel, an odd number.
        act_layer: Makes the activation.
    """

    def __init__(
        self, dim: int, kernel_size: int = 3, *, act_layer: Callable[[], nn.Module] = nn.GELU, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = act_layer()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the norm into the convolution, for inference."""
        self.norm = fold_behind(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class SharedDepthwiseConv(nn.Module):
    """A depthwise convolution, with a bias, of `heads` groups of channels that share their kernels.

    Shapes: (batch, heads * head_dim, height, width) to the same.

    Source: FLatten Transformer (Han et al. 2023, arXiv 2308.00442).

    Args:
        head_dim: Channels of a group.
        heads: Number of groups.
        kernel_size: Rows and columns of the kernel, an odd number.
    """

    def __init__(self, head_dim: int, heads: int, kernel_size: int, **dd: Any) -> None:
        super().__init__()
        one = nn.Conv2d(head_dim, head_dim, kernel_size, groups=head_dim, **dd)
        self.weight, self.bias = one.weight, one.bias
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        # Copies of the few kernels, where heads in the batch's axis would copy the map.
        weight, bias = self.weight.repeat(self.heads, 1, 1, 1), self.bias.repeat(self.heads)
        return F.conv2d(x, weight, bias, padding=self.weight.shape[-1] // 2, groups=x.shape[1])


class CausalConv(nn.Conv1d):
    """`torch.nn.Conv1d`, depthwise, of each token and those before it: (batch, length, dim) to the same."""

    def forward(self, x: Tensor) -> Tensor:
        return _causal_conv(x, self.weight, self.bias)


@torch.fx.wrap
def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    length, taps = x.shape[1], weight.shape[2]
    x = F.pad(x, [0, 0, taps - 1, 0])
    if not torch.jit.is_scripting() and bias is not None:
        if x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            # A sum of few taps reads tokens as they lie; oneDNN's convolution, between two transposes, takes twice as
            # long, and with gradients in bfloat16 three times. Half types are summed in float32, as there.
            wide, each = at_least_float32(x), at_least_float32(weight).squeeze(1).t().contiguous()
            y = torch.addcmul(at_least_float32(bias), wide[:, :length], each[0])
            for tap in range(1, taps):
                y.addcmul_(wide[:, tap : tap + length], each[tap])
            return y.to(x.dtype)
    return F.conv1d(x.transpose(1, 2), weight, bias, groups=weight.shape[0]).transpose(1, 2)


class OmniShift(nn.Module):
    """A cell and its neighbours within 5x5, in the proportions ``alpha``: RWKV's token shift in all directions.

        y = alpha_0 x + alpha_1 depthwise1x1(x) + alpha_2 depthwise3x3(x) + alpha_3 depthwise5x5(x)

    Convolutions have no biases. They are computed as the one depthwise 5x5 convolution that they make up.

    Shapes: (batch, height, width, dim) to the same.

    Source: Restore-RWKV (Yang et al. 2024, arXiv 2407.11087).

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(4, **dd))
        self.weight1, self.weight3, self.weight5 = (
            nn.Conv2d(dim, dim, size, groups=dim, bias=False, **dd).weight for size in (1, 3, 5)
        )
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the proportions from a standard normal, as the published code does."""
        nn.init.normal_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        cell, three, five = self.alpha[1] * self.weight1, self.alpha[2] * self.weight3, self.alpha[3] * self.weight5
        weight = F.pad(F.pad(self.alpha[0] + cell, [1, 1, 1, 1]) + three, [1, 1, 1, 1]) + five
        return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=2, groups=x.shape[3]).permute(0, 2, 3, 1)

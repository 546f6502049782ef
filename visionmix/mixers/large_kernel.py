"""Large kernel attention: VAN's mixer."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import scaled_gate, unscaled, zero_token
from visionmix.mixers.registry import register_mixer


@register_mixer("lka")
class LargeKernelAttention(nn.Module):
    """A gate made by convolutions that reach as far as one of a large kernel, between two projections.

        u   = gelu(W_i x)
        out = W_o (u * W_g dilated(depthwise(u))) + x

    Both convolutions are depthwise. The first has ``2 dilation - 1`` rows and columns, the second the smallest number
    at `dilation` that covers `kernel_size`, ``ceil(kernel_size / dilation)``: 5 and 7 by default. x is added here,
    inside the mixer, and once more by a block around it.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: VAN (Guo et al. 2022, arXiv 2202.09741).

    Args:
        dim: Channels.
        kernel_size: Rows and columns of the large kernel that the convolutions stand for.
        dilation: Cells from one tap of the second convolution to the next.

    Raises:
        ValueError: `dilation` is below 1, or ``ceil(kernel_size / dilation)`` is no odd number.
    """

    def __init__(self, dim: int, kernel_size: int = 21, dilation: int = 3, **dd: Any) -> None:
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation={dilation} is no distance between taps; give 1 or more")
        taps = -(-kernel_size // dilation)
        if taps < 1 or taps % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} needs {taps} taps at dilation={dilation}; give sizes that need an odd "
                "number, so that a window has a middle"
            )
        depthwise = {"groups": dim, **dd}
        self.proj_in = nn.Linear(dim, dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 2 * dilation - 1, padding=dilation - 1, **depthwise)
        self.dilated = nn.Conv2d(dim, dim, taps, padding=taps // 2 * dilation, dilation=dilation, **depthwise)
        self.gate = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.proj_in(x))
        gate = self.gate(self.dilated(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        out, scale = scaled_gate(u, gate)
        return unscaled(self.proj(out), scale, self.proj(zero_token(out))) + x

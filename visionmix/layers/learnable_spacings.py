"""Kernels whose few elements lie at learned positions."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

_VERSIONS = ("v0", "v1", "max", "gauss")


class SpacedKernel(nn.Module):
    """A large kernel of few weights at learned positions: each is spread over the cells around its own.

    With the distance d of a cell from the position along an axis, the share of a cell in a weight is the product over
    both axes of

        "v0"     1 - d at the cell before the position or at it, 1 - |d| at the one behind, 0 elsewhere: bilinear
        "v1"     relu(1 - |d|)
        "max"    relu(1 + |sigma| - |d|)
        "gauss"  exp(-d^2 / (2 (0.27 + |sigma|)^2))

    and in all but "v0" divided by 1e-7 plus its sum over all cells. Shares beyond the border are lost. "v0" and "v1"
    differ there, and in the gradient of a position that is a cell's, which "v1" has none for.

    Shapes: weights (out_channels, in_channels, kernel_count) to (out_channels, in_channels, kernel_size, kernel_size).

    Source: dilated convolution with learnable spacings (Khalfaoui-Hassani et al. 2021, arXiv 2112.03740), and its
    code. Positions are rows, then columns, from the centre; in that code's files they are so for "v0", and columns
    first for the others.

    Args:
        out_channels: Channels out.
        in_channels: Channels in, of one group.
        kernel_size: Rows and columns of the kernel, an odd number.
        kernel_count: Weights of each pair of channels.
        version: "v0", "v1", "max" or "gauss".

    Raises:
        ValueError: `kernel_size` is even, `kernel_count` is below 1, or `version` is unknown.
    """

    undecayed = ("positions",)

    def __init__(
        self,
        out_channels: int,
        in_channels: int = 1,
        *,
        kernel_size: int = 17,
        kernel_count: int = 34,
        version: str = "v0",
        **dd: Any,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even; give an odd number, so that a window has a middle")
        if kernel_count < 1:
            raise ValueError(f"kernel_count={kernel_count} leaves the kernel empty; give 1 or more")
        if version not in _VERSIONS:
            raise ValueError(f"version={version!r} is unknown; give one of {_VERSIONS}")
        self.reach = kernel_size // 2
        self.version = version
        shape = (2, out_channels, in_channels, kernel_count)
        self.positions = nn.Parameter(torch.empty(shape, **dd))
        self.register_parameter("sigma", None)
        if version in ("max", "gauss"):
            self.sigma = nn.Parameter(torch.empty(shape, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw positions from a normal of deviation 0.5 around the centre; sigma begins at 0, for "gauss" at 0.23."""
        nn.init.normal_(self.positions, std=0.5)
        self.set_progress(0.0)
        if self.sigma is not None:
            nn.init.constant_(self.sigma, 0.23 if self.version == "gauss" else 0.0)

    @torch.jit.ignore
    def set_progress(self, done: float) -> None:
        """Bring positions that the last step moved beyond the border back to it, whatever is `done`."""
        with torch.no_grad():
            self.positions.clamp_(-self.reach, self.reach)

    def forward(self, weight: Tensor) -> Tensor:
        shares = _shares(self.positions, self.sigma, self.version, self.reach)
        if self.version != "v0":
            total = shares.sum(dim=-1)
            weight = weight / (total[0] * total[1] + 1e-7)
        # A product of matrices over the elements: rows by elements, elements by columns.
        return (shares[0] * weight.unsqueeze(-1)).transpose(-2, -1) @ shares[1]


@torch.fx.wrap
def _shares(positions: Tensor, sigma: Tensor | None, version: str, reach: int) -> Tensor:
    """Return the shares of the cells (2, out_channels, in_channels, kernel_count, cells) along rows and columns."""
    cells = torch.arange(-reach, reach + 1, device=positions.device)
    place = positions.unsqueeze(-1)
    if version == "v0":
        first = place.floor()
        behind = place - first
        return (1 - behind) * (cells == first) + behind * (cells == first + 1)
    distance = (cells - place).abs()
    width = torch.zeros_like(place) if sigma is None else sigma.abs().unsqueeze(-1)
    if version == "gauss":
        return torch.exp(-0.5 * (distance / (0.27 + width)) ** 2)
    return F.relu(1 + width - distance)

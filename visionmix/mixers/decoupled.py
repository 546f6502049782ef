"""Linear attention, small and large convolutions side by side, past channels that stay: CARE's mixer."""

from typing import Any, Final

import torch
from torch import Tensor, nn

from visionmix.layers import at_least_float32
from visionmix.mixers.linear import averages, dot, elu_plus_one, key_levels
from visionmix.mixers.registry import register_mixer


@register_mixer("decoupled")
class DecoupledMixer(nn.Module):
    """Four groups of channels, each mixed by itself: memory, far cells, near cells, cells a little farther.

    The last three groups a, b and c have ``dim // 4`` channels each; m has the others.

        out = [m, attend(a), depthwise3x3(b), depthwise7x7(c)]

    In each head of the group a, with ``q, k = elu(W a) + 1`` over the n cells of the map,

        attend(a) = q (k^T a) / (n q mean(k) + 1e-6 n)

    so that the values are the input itself and no projection follows. With `strips`, ``attend(a)`` is the sum of two
    depthwise convolutions instead, along the columns and along the rows. All have biases. Feature maps and normalisers
    are computed in float32 at least.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: asymmetric feature decoupling, CARE (Zhou et al. 2024, arXiv 2411.16170).

    Args:
        dim: Channels, at least 4.
        num_heads: Heads of the group a; a divisor of its channels.
        strips: Length of the two convolutions in place of attention, an odd number; None for attention.

    Raises:
        ValueError: `dim` is below 4, `num_heads` does not divide ``dim // 4``, or `strips` is even.
    """

    attends: Final[bool]

    def __init__(self, dim: int, num_heads: int = 1, strips: int | None = None, **dd: Any) -> None:
        super().__init__()
        group = dim // 4
        if group < 1:
            raise ValueError(f"dim={dim} is too small for four groups of channels; give 4 or more")
        if strips is None and (num_heads < 1 or group % num_heads):
            raise ValueError(
                f"num_heads={num_heads} does not divide the {group} channels of the group that attends; give a divisor "
                f"of {group}"
            )
        if strips is not None and strips % 2 == 0:
            raise ValueError(f"strips={strips} is even; give an odd number, so that a window has a middle")
        self.groups = [dim - 3 * group, group, group, group]
        self.heads = num_heads
        self.attends = strips is None

        def conv(rows: int, columns: int) -> nn.Conv2d:
            return nn.Conv2d(group, group, (rows, columns), padding=(rows // 2, columns // 2), groups=group, **dd)

        if strips is None:
            self.qk = nn.Linear(group, 2 * group, **dd)
        else:
            self.column_conv, self.row_conv = conv(strips, 1), conv(1, strips)
        self.near_conv, self.far_conv = conv(3, 3), conv(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        memory, a, b, c = x.split(self.groups, dim=-1)
        if self.attends:
            mixed = self._attend(a)
        else:
            cells = a.permute(0, 3, 1, 2)
            mixed = (self.column_conv(cells) + self.row_conv(cells)).permute(0, 2, 3, 1)
        near = self.near_conv(b.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        far = self.far_conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.cat([memory, mixed, near, far], dim=-1)

    def _attend(self, a: Tensor) -> Tensor:
        qk = elu_plus_one(at_least_float32(self.qk(a).flatten(1, 2).unflatten(-1, (2 * self.heads, -1))))
        q, k = qk.chunk(2, dim=2)
        mean = k.mean(dim=1, keepdim=True)
        v = at_least_float32(a.flatten(1, 2).unflatten(-1, (self.heads, -1)))
        out = averages(q, k, v, dot(q, mean) + 1e-6, key_levels(mean, False))
        return out.flatten(2).unflatten(1, (a.shape[1], a.shape[2])).to(a.dtype)

"""RWKV's attention in both directions, along rows and then along columns: Restore-RWKV's mixer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.layers import OmniShift, at_least_float32
from visionmix.mixers.registry import register_mixer


@register_mixer("recurrent_wkv")
class RecurrentWkv(nn.Module):
    """Averages of the values whose weights fall with the distance along the sequence, taken again along the columns.

    With ``y = omni_shift(x)`` and ``k, v, r = W_k y, W_v y, W_r y``, in each channel, over the n cells of the map in
    row-major order,

        v_t <- (sum_(i != t) exp(k_i - (|t - i| - 1) w / n) v_i + exp(k_t + u / n) v_t) / (the same without v)

    then likewise in column-major order with another decay w and bonus u, and so on in turns, `recurrences` times.

        out = W_o (sigmoid(r) * v)

    Time and memory are linear in the cells: the sums are selective scans of one state. They run in float32 at least,
    with weights relative to the largest key of a channel. A decay over the whole map, ``exp(-w)``, must lie within
    float32's range.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: Re-WKV of Restore-RWKV (Yang et al. 2024, arXiv 2407.11087), by its formula: the released CUDA kernel joins
    64 chunks of a sequence by shuffles that reach 32 of them.

    Args:
        dim: Channels.
        recurrences: How often the values are averaged; rows and columns in turns, rows first.

    Raises:
        ValueError: `recurrences` is below 1.
    """

    undecayed = ("decay", "bonus")

    def __init__(self, dim: int, recurrences: int = 2, **dd: Any) -> None:
        super().__init__()
        if recurrences < 1:
            raise ValueError(f"recurrences={recurrences} averages no values; give 1 or more")
        self.recurrences = recurrences
        self.shift = OmniShift(dim, **dd)
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.decay = nn.Parameter(torch.empty(recurrences, dim, **dd))
        self.bonus = nn.Parameter(torch.empty(recurrences, dim, **dd))
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw decays and bonuses from a standard normal, as the published code does."""
        nn.init.normal_(self.decay)
        nn.init.normal_(self.bonus)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = self.shift(x)
        k, v = at_least_float32(self.key(x)), at_least_float32(self.value(x))
        k = torch.exp(k - k.detach().amax(dim=[1, 2], keepdim=True))
        decay, bonus = at_least_float32(self.decay) / (height * width), at_least_float32(self.bonus) / (height * width)
        for index in range(self.recurrences):
            v = _averages(k, v, decay[index], torch.exp(bonus[index])).unflatten(1, k.shape[1:3])
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.recurrences % 2:
            v = v.transpose(1, 2)
        receptance = torch.sigmoid(self.receptance(x))
        return self.proj((v * receptance).to(receptance.dtype))


def _averages(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Return averages (batch, cells, dim) of v with weights k, both (batch, rows, columns, dim), in row-major order.

    Args:
        k: Weights at the distance 1.
        v: Values.
        decay: Logarithms of what a step divides weights by, (dim,).
        bonus: Factors of a cell's own weight, (dim,).
    """
    # The values' sum and the weights' sum are channels of one scan; so are the directions.
    parts = torch.cat([k * v, k], dim=-1).flatten(1, 2)
    before, after = F.pad(parts[:, :-1], [0, 0, 1, 0]), F.pad(parts[:, 1:], [0, 0, 0, 1]).flip(1)
    inputs = torch.cat([before, after], dim=-1).transpose(1, 2)
    rates, one = -decay.repeat(4).unsqueeze(1), decay.new_ones([4 * decay.shape[0], 1])
    step = one.unsqueeze(0).expand_as(inputs)
    sums, _ = selective_scan_op(inputs, step, rates, one, one, None, None, None, False, False)
    before, after = sums.transpose(1, 2).chunk(2, dim=-1)
    total, weights = (before + after.flip(1) + parts * bonus.repeat(2)).chunk(2, dim=-1)
    return total / weights.clamp_min(1e-37)  # 0 where all that a cell sees is below float32's range

"""pLSTM's mixer: a 2-D recurrence from the four corners of the map."""

from typing import Any, Final

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.plstm_2d import plstm_2d_op
from visionmix.layers import at_least_float32
from visionmix.mixers.registry import register_mixer


class _Gate(nn.Module):
    """``w_g x_g + b_g``, where gate g reads the g-th of as many slices of channels as there are gates, in float32.

    Shapes: (..., dim) to (..., count).
    """

    def __init__(self, dim: int, count: int, bias: float, **dd: Any) -> None:
        super().__init__()
        self.initial = bias
        self.weight = nn.Parameter(torch.empty(count, dim // count, **dd))
        self.bias = nn.Parameter(torch.empty(count, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.unflatten(-1, self.weight.shape) * self.weight).sum(-1)
        return at_least_float32(y + self.bias)


@register_mixer("plstm")
class PLSTM(nn.Module):
    """A linear recurrence along the rows and columns of a map, from its four corners, on matrix states.

    With ``q, k, v = W x + b``, gates per head, direction and cell, and the recurrence of `visionmix.kernels.plstm_2d`:

        out = W_out rms(plstm_2d(q, k, v, gates, sigmoid(b_direct)))

    where rms is a root mean square norm of each head. Sources s and marks m are ``sigmoid(w x + b)``, transitions
    ``tanh(5 (w x + b))``; each gate reads its own slice of the channels.

    In mode "P" a state spreads over the plane: with an orientation ``o = sigmoid(b + w x / (2 dim))`` from all
    channels, the edge along the rows takes ``o s`` and ``o t``, the one along the columns ``1 - o s`` and ``1 - o t``.
    These complements are the published code's; the paper has ``(1 - o) s`` and ``(1 - o) t``. In mode "D" every edge
    has gates of its own and a path turns at most once.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: pLSTM (Pöppel et al. 2025, arXiv 2506.11997).

    Args:
        dim: Channels.
        num_heads: Number of heads; a fourth of a divisor of `dim`.
        mode: "P" or "D".
        chirality: Which turn paths take in mode "D": "L" from the columns' axis to the rows', "R" the reverse.
        norm_eps: Epsilon of the norm of heads, which are small before it.

    Raises:
        ValueError: ``4 * num_heads`` does not divide `dim`, or `mode` or `chirality` is unknown.
    """

    spreads: Final[bool]
    turns_left: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        mode: str = "P",
        chirality: str = "L",
        norm_eps: float = 1e-5,
        **dd: Any,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (4 * num_heads):
            raise ValueError(
                f"num_heads={num_heads} does not fit dim={dim}: each head has four gates of a kind, which share the "
                "channels; give a fourth of a divisor of dim"
            )
        for name, value, known in (("mode", mode, "PD"), ("chirality", chirality, "LR")):
            if value not in tuple(known):
                raise ValueError(f"{name}={value!r} is unknown; give {' or '.join(map(repr, known))}")
        self.num_heads = num_heads
        self.spreads = mode == "P"
        self.turns_left = chirality == "L"
        self.norm_eps = norm_eps
        gates = 4 * num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        if self.spreads:
            self.orientation = nn.Linear(dim, gates, **dd)
            self.source = _Gate(dim, gates, -4.0, **dd)
            self.transition = _Gate(dim, gates, 1.0, **dd)
            self.mark = _Gate(dim, gates, -4.0, **dd)
        else:
            self.source_r = _Gate(dim, gates, -4.0, **dd)
            self.source_d = _Gate(dim, gates, -4.0, **dd)
            self.transition_r = _Gate(dim, gates, 1.0, **dd)
            self.transition_d = _Gate(dim, gates, 1.0, **dd)
            self.transition_rd = _Gate(dim, gates, 1.0, **dd)
            self.mark_l = _Gate(dim, gates, -4.0, **dd)
            self.mark_u = _Gate(dim, gates, -4.0, **dd)
        self.direct = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm_weight = nn.Parameter(torch.empty(dim, **dd))
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Draw the weights as the published code does."""
        for layer in (self.qkv, self.proj):
            trunc_normal_(layer.weight, std=(2 / (5 * layer.in_features)) ** 0.5)
        nn.init.zeros_(self.qkv.bias)
        nn.init.constant_(self.direct, -6.0)
        nn.init.ones_(self.norm_weight)
        if self.spreads:
            nn.init.zeros_(self.orientation.weight)
            with torch.no_grad():
                self.orientation.bias.copy_(torch.linspace(-2, 2, self.num_heads).repeat(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        turn_up, turn_left = torch.jit.annotate(Tensor | None, None), torch.jit.annotate(Tensor | None, None)
        if self.spreads:
            share = torch.sigmoid(at_least_float32(self.orientation(x * (0.5 / x.shape[-1]))))
            source_r = share * torch.sigmoid(self.source(x))
            transition_r = share * torch.tanh(5 * self.transition(x))
            source_d, transition_d = 1 - source_r, 1 - transition_r
            turn_up, turn_left = transition_r.unflatten(-1, heads), transition_d.unflatten(-1, heads)
            mark_l = torch.sigmoid(self.mark(x))
            mark_u = mark_l
        else:
            source_r, source_d = torch.sigmoid(self.source_r(x)), torch.sigmoid(self.source_d(x))
            transition_r, transition_d = torch.tanh(5 * self.transition_r(x)), torch.tanh(5 * self.transition_d(x))
            turn = torch.tanh(5 * self.transition_rd(x)).unflatten(-1, heads)
            if self.turns_left:
                turn_up = turn
            else:
                turn_left = turn
            mark_l, mark_u = torch.sigmoid(self.mark_l(x)), torch.sigmoid(self.mark_u(x))
        y = plstm_2d_op(
            q.unflatten(-1, heads),
            k.unflatten(-1, heads),
            v.unflatten(-1, heads),
            (source_r.unflatten(-1, heads), source_d.unflatten(-1, heads)),
            (transition_r.unflatten(-1, heads), transition_d.unflatten(-1, heads), turn_up, turn_left),
            (mark_l.unflatten(-1, heads), mark_u.unflatten(-1, heads)),
            torch.sigmoid(self.direct).expand(x.shape[0], x.shape[1], x.shape[2], -1),
        )
        y = F.rms_norm(y, [y.shape[-1]], None, self.norm_eps).flatten(3)
        return self.proj((y * self.norm_weight).to(x.dtype))

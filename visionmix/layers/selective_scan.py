"""Selective scans with their parameters: the projection to their inputs, decay rates, step sizes, skip."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.kernels.selective_scan_2d import selective_scan_2d_op
from visionmix.layers.conv import CausalConv
from visionmix.layers.half_precision import at_least_float32, scan_dtype
from visionmix.layers.order import scan_order
from visionmix.scans import move_codes
from visionmix.scans.kept import steps_of
from visionmix.scans.order_names import join_orders, split_orders

_STEP_RANGE = (1e-3, 0.1)
_MOVES = 5


@torch.fx.wrap
def _decay_rates(logarithms: Tensor) -> Tensor:
    """Return ``-exp(logarithms)``, in float32 where they are of half precision: decays compound over a sequence."""
    return -torch.exp(at_least_float32(logarithms))


@torch.fx.wrap
def _moves(orders: str, height: int, width: int, permute: str, like: Tensor) -> Tensor:
    """Return, for every cell, the code of the move into the step that reads B there, int64 (height, width, K)."""
    maps = []
    for name in split_orders(orders):
        index, inverse = scan_order(name, height, width, like)
        if permute == "input":  # B is read in raster order
            codes = move_codes(index, width)
            codes = torch.cat([codes, codes.new_zeros(height * width)])[: height * width]
        else:
            codes = _moves_to_cells(index, inverse, width)
        maps.append(codes.reshape(height, width))
    return torch.stack(maps, dim=-1)


def _moves_to_cells(index: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return the code of the move to every cell, int64 (cells,); 0 for a cell that is not read, whose step is -1."""
    codes = move_codes(index, width)
    return torch.cat([codes, codes.new_zeros(1)])[inverse]


def scan_sizes(dim: int, expand: float, dt_rank: int | None) -> tuple[int, int]:
    """Return what a mixer of `dim` channels gives its scan: ``int(dim * expand)`` channels, and the steps' rank.

    The rank is `dt_rank`, or ``ceil(dim / 16)`` for None.

    Raises:
        ValueError: `expand` leaves no channel.
    """
    width = int(dim * expand)
    if width < 1:
        raise ValueError(f"expand={expand} leaves no channel of dim={dim} for the scan; give 1 / dim or more")
    return width, math.ceil(dim / 16) if dt_rank is None else dt_rank


class _ScanParameters(nn.Module):
    """`count` sets of a selective scan's parameters; see `SelectiveScan2d`."""

    undecayed = ("A_log", "D", "delta_bias")

    def __init__(self, dim: int, count: int, *, dt_rank: int, d_state: int, **dd: Any) -> None:
        super().__init__()
        for name, value in (("dt_rank", dt_rank), ("d_state", d_state)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        self.widths = [dt_rank, d_state, d_state]
        self.x_proj = nn.Linear(dim, count * sum(self.widths), bias=False, **dd)
        self.delta_weight = nn.Parameter(torch.empty(count, dim, dt_rank, **dd))
        self.delta_bias = nn.Parameter(torch.empty(count, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(count, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(count, dim, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Initialise the parameters."""
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))  # as `nn.Linear`, not as the backbones draw
        bound = self.delta_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.delta_weight, -bound, bound)
        with torch.no_grad():
            low, high = (math.log(step) for step in _STEP_RANGE)
            step = torch.empty_like(self.delta_bias, dtype=torch.float32).uniform_(low, high).exp()
            self.delta_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            d_state = self.A_log.shape[-1]
            self.A_log.copy_(torch.arange(1, d_state + 1, dtype=torch.float32, device=self.A_log.device).log())
            self.D.fill_(1.0)


class SelectiveScan2d(_ScanParameters):
    """The selective scan over K orders of a map, each with parameters of its own, brought back to the map and merged.

    In order k, with ``dt, B_t, C_t = W_k x_t`` of widths `dt_rank`, `d_state` and `d_state`:

        delta_t = softplus(V_k dt + b_k)
        h_t     = exp(delta_t A_k) * h_(t-1) + delta_t B_t x_t,  A_k = -exp(A_log_k)
        y_t     = C_t h_t + D_k x_t

    ``A_log`` begins as ``log(1..d_state)``, D as 1, and ``b`` so that the steps begin log-uniform between 0.001 and
    0.1; optimisers do not decay these three.

    Shapes: (batch, height, width, dim) to the same; to (batch, height, width, routes, dim) for ``merge="none"``. The
    result is float32 where the map is of half precision, for the norm or gate that follows.

    Source: Mamba (Gu and Dao 2023, arXiv 2312.00752); over several orders, VMamba (Liu et al. 2024, arXiv 2401.10166);
    `shared`, `permute` and `moves`, PlainMamba (Yang et al. 2024, arXiv 2403.17695).

    Args:
        dim: Channels.
        orders: Names of the orders, as `visionmix.scans.order` takes them; those joined by "+" are one sequence.
        dt_rank: Rank of the projection to the steps.
        d_state: States per channel.
        merge: "sum" or "mean" of the orders' outputs, or "none" for all of them.
        shared: Whether the orders share one set of parameters.
        permute: "all" reads everything in the orders; "input" reads x alone in them, while step t takes ``dt``, B and C
            from cell t in raster order, or zeros beyond the last cell.
        moves: Whether a learned vector is added to B at each step, for the move that led there: start, right, left, up
            or down, as `visionmix.scans.move_codes` numbers them.
        bias_scale: Factor of ``b``.

    Raises:
        ValueError: `dt_rank` or `d_state` is below 1, or `permute` is unknown.
    """

    undecayed = (*_ScanParameters.undecayed, "move_B")

    bias_scale: Final[float]
    moves: Final[bool]
    shared: Final[bool]

    def __init__(
        self,
        dim: int,
        orders: Sequence[str],
        *,
        dt_rank: int,
        d_state: int = 1,
        merge: str = "sum",
        shared: bool = False,
        permute: str = "all",
        moves: bool = False,
        bias_scale: float = 1.0,
        **dd: Any,
    ) -> None:
        if permute not in ("all", "input"):
            raise ValueError(f"permute={permute!r} is unknown; give 'all' or 'input'")
        super().__init__(dim, 1 if shared else len(orders), dt_rank=dt_rank, d_state=d_state, **dd)
        self.orders = join_orders(orders)
        self.count = len(orders)
        self.merge = merge
        self.shared = shared
        self.permute = permute
        self.moves = moves
        self.bias_scale = bias_scale
        if moves:
            self.move_B = nn.Parameter(trunc_normal_(torch.empty(_MOVES, d_state, **dd), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        steps, delta_weight, A, B, C, D, delta_bias = self._inputs(x)
        if self.moves:
            codes = _moves(self.orders, x.shape[1], x.shape[2], self.permute, x)
            B = B + F.embedding(codes, self.move_B).to(B.dtype)
        return selective_scan_2d_op(
            x, steps, delta_weight, A, B, C, D, delta_bias, True, self.orders, self.merge, self.permute, scan_dtype(x)
        )

    @torch.jit.ignore
    def forward_kept(
        self, x: Tensor, kept: Tensor, grid: tuple[int, int], align: bool = True, merge: str | None = None
    ) -> Tensor:
        """Return the scans of tokens that are left of a map, (batch, tokens, dim), those of others being gone.

        They are read in the whole map's orders. The state crosses the places of the others with the decay that tokens
        of zeros would bring there, ``exp(softplus(b) A)`` each, as `visionmix.kernels.selective_scan_2d` does it with
        gaps. With `moves`, B has the vector of the whole map's move to a token's cell. Where x alone is read in the
        orders (`permute` "input"), step t takes ``dt``, B and C from the t-th of the tokens.

        Args:
            x: The tokens, (batch, tokens, dim), in row-major order of their cells.
            kept: Their cells, int64 (batch, tokens), rising.
            grid: Rows and columns of the map.
            align: Whether there are gaps; otherwise the tokens are a sequence of their own.
            merge: In place of the scan's own.
        """
        x = x.unsqueeze(1)
        steps, delta_weight, A, B, C, D, delta_bias = self._inputs(x)
        orders = [scan_order(name, grid[0], grid[1], x) for name in split_orders(self.orders)]
        cells, gaps = steps_of(torch.stack([inverse for _, inverse in orders]), kept)
        if self.moves:
            codes = torch.stack([_moves_to_cells(index, inverse, grid[1]) for index, inverse in orders])
            codes = codes[:, kept].transpose(0, 1)  # (batch, K, tokens)
            if self.permute == "input":
                codes = codes.gather(2, cells)  # of the token that x is read of at each step
            B = B + F.embedding(codes.transpose(1, 2).unsqueeze(1), self.move_B).to(B.dtype)
        options = (True, "", self.merge if merge is None else merge, self.permute, scan_dtype(x))
        y = selective_scan_2d_op(
            x, steps, delta_weight, A, B, C, D, delta_bias, *options, cells, gaps if align else None
        )
        return y.squeeze(1)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return delta, its weight where it is of low rank, A, B, C, D and the steps' bias, as the op takes them."""
        steps, B, C = self.x_proj(x).unflatten(-1, (-1, sum(self.widths))).split(self.widths, dim=-1)
        delta_weight = torch.jit.annotate(Tensor | None, self.delta_weight)
        A, D, delta_bias = _decay_rates(self.A_log), self.D, self.delta_bias
        if self.shared:
            # The step sizes at full rank are one map for all orders: they are made once, not in each.
            steps, delta_weight = self._each(F.linear(steps, self.delta_weight[0])), None
            B, C = self._each(B), self._each(C)
            A = A.expand(self.count, -1, -1)
            D, delta_bias = D.expand(self.count, -1), delta_bias.expand(self.count, -1)
        if self.bias_scale != 1.0:
            delta_bias = delta_bias * self.bias_scale
        return steps, delta_weight, A, B, C, D, delta_bias

    def _each(self, x: Tensor) -> Tensor:
        """Return x (batch, height, width, 1, features) repeated for each of the orders, without a copy."""
        return x.expand(-1, -1, -1, self.count, -1)


class StateScan2d(_ScanParameters):
    """The states of a selective scan over one order of a map, one state per channel, brought back to the map.

    Those of the recurrence of `SelectiveScan2d`, with C and D left to the caller, who reads the states later as
    ``y = C h + D x``.

    Shapes: (batch, height, width, dim) to h, the same, in float32 where the map is of half precision, and C, (batch,
    height, width, 1).

    Source: Spatial-Mamba (Xiao et al. 2024, arXiv 2410.15091).

    Args:
        dim: Channels.
        order: Name of the order, as `visionmix.scans.order` takes it.
        dt_rank: Rank of the projection to the steps.

    Raises:
        ValueError: `dt_rank` is below 1.
    """

    def __init__(self, dim: int, order: str, *, dt_rank: int, **dd: Any) -> None:
        super().__init__(dim, 1, dt_rank=dt_rank, d_state=1, **dd)
        self.order = order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, B, C = self.x_proj(x).unsqueeze(3).split(self.widths, dim=-1)
        A, one = _decay_rates(self.A_log), torch.ones_like(C)  # a readout of one is the state itself
        out_dtype = scan_dtype(x)
        states = selective_scan_2d_op(
            x, steps, self.delta_weight, A, B, one, None, self.delta_bias, True, self.order, "sum", "all", out_dtype
        )
        return states, C.squeeze(3)


class SelectiveScan1d(_ScanParameters):
    """A causal convolution along a sequence, SiLU and a selective scan, as inside Mamba.

    ``x = silu(conv(x))``, a depthwise convolution over the token and the ``d_conv - 1`` before it, then the
    recurrence of `SelectiveScan2d` in the sequence's order.

    Shapes: (batch, length, dim) to the same, in float32 where they come in half precision.

    The second argument of a call, `positions`, is for tokens kept from a longer sequence: their places in it, int64
    (batch, length), rising. The state then crosses the places between two tokens with the decay that tokens of zeros
    would bring there, ``exp(softplus(b) A)`` each; the convolution sees the kept tokens.

    Source: Mamba (Gu and Dao 2023, arXiv 2312.00752).

    Args:
        dim: Channels.
        dt_rank: Rank of the projection to the steps.
        d_state: States per channel.
        d_conv: Tokens that the convolution sees.

    Raises:
        ValueError: `dt_rank`, `d_state` or `d_conv` is below 1.
    """

    def __init__(self, dim: int, *, dt_rank: int, d_state: int = 16, d_conv: int = 4, **dd: Any) -> None:
        super().__init__(dim, 1, dt_rank=dt_rank, d_state=d_state, **dd)
        if d_conv < 1:
            raise ValueError(f"d_conv={d_conv} is too small; give 1 or more")
        self.conv = CausalConv(dim, dim, d_conv, groups=dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        gap = torch.jit.annotate(Tensor | None, None)
        if positions is not None:
            skipped = positions.diff(dim=1, prepend=positions[:, :1] - 1) - 1
            gap = skipped.unsqueeze(1) * F.softplus(self.delta_bias[0]).unsqueeze(1)
        x = self.act(self.conv(x))
        steps, B, C = self.x_proj(x).split(self.widths, dim=-1)
        y, _ = selective_scan_op(
            x.transpose(1, 2),
            F.linear(steps, self.delta_weight[0]).transpose(1, 2),
            _decay_rates(self.A_log[0]),
            B.transpose(1, 2).unsqueeze(1),
            C.transpose(1, 2).unsqueeze(1),
            self.D[0],
            None,
            self.delta_bias[0],
            True,
            False,
            gap,
            scan_dtype(x),
        )
        return y.transpose(1, 2)

"""The selective scan of a map with what it learns: the projection to its inputs, decay rates, step sizes, skip."""

import math
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn

from visionmix.kernels.selective_scan_2d import selective_scan_2d_op

_STEP_RANGE = (1e-3, 0.1)


@torch.fx.wrap
def _decay_rates(logarithms: Tensor) -> Tensor:
    """Return ``-exp(logarithms)``, in float32 where they are of half precision: decays compound over a sequence."""
    if logarithms.dtype == torch.float16 or logarithms.dtype == torch.bfloat16:
        logarithms = logarithms.float()
    return -torch.exp(logarithms)


class SelectiveScan2d(nn.Module):
    """The selective scan over K orders of a map, each with parameters of its own, brought back to the map and merged.

    In order k, with ``dt, B_t, C_t = W_k x_t`` of widths `step_rank`, `states` and `states`:

        delta_t = softplus(V_k dt + b_k)
        h_t     = exp(delta_t A_k) * h_(t-1) + delta_t B_t x_t,  A_k = -exp(A_log_k)
        y_t     = C_t h_t + D_k x_t

    ``A_log`` begins as ``log(1..states)``, D as 1, and ``b`` so that the steps begin log-uniform between 0.001 and 0.1;
    optimisers do not decay these three.

    Shapes: (batch, height, width, dim) to the same; to (batch, height, width, routes, dim) for ``merge="none"``.

    Source: Mamba (Gu and Dao 2023, arXiv 2312.00752); over several orders, VMamba (Liu et al. 2024, arXiv 2401.10166).

    Args:
        dim: Channels.
        orders: Names of the orders, as `visionmix.scans.order` takes them; those joined by "+" are one sequence.
        step_rank: Rank of the projection to the steps.
        states: States a channel.
        merge: "sum" or "mean" of the orders' outputs, or "none" for all of them.
        device: Where the parameters lie.
        dtype: Type of the parameters.

    Raises:
        ValueError: `step_rank` or `states` is below 1.
    """

    def __init__(
        self,
        dim: int,
        orders: Sequence[str],
        *,
        step_rank: int,
        states: int = 1,
        merge: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("step_rank", step_rank), ("states", states)):
            if value < 1:
                raise ValueError(f"{name}={value} is too small; give 1 or more")
        dd = {"device": device, "dtype": dtype}
        count = len(orders)
        self.orders = ",".join(orders)
        self.merge = merge
        self.widths = [step_rank, states, states]
        self.x_proj = nn.Linear(dim, count * sum(self.widths), bias=False, **dd)
        self.delta_weight = nn.Parameter(torch.empty(count, dim, step_rank, **dd))
        self.delta_bias = nn.Parameter(torch.empty(count, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(count, dim, states, **dd))
        self.D = nn.Parameter(torch.empty(count, dim, **dd))
        for parameter in (self.delta_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the parameters to what they begin as."""
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))  # a linear layer's own, not the backbones' normal
        bound = self.delta_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.delta_weight, -bound, bound)
        with torch.no_grad():
            low, high = (math.log(step) for step in _STEP_RANGE)
            step = torch.empty_like(self.delta_bias, dtype=torch.float32).uniform_(low, high).exp()
            self.delta_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            states = self.A_log.shape[-1]
            self.A_log.copy_(torch.arange(1, states + 1, dtype=torch.float32, device=self.A_log.device).log())
            self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        steps, B, C = self.x_proj(x).unflatten(-1, (-1, sum(self.widths))).split(self.widths, dim=-1)
        return selective_scan_2d_op(
            x,
            steps,
            self.delta_weight,
            _decay_rates(self.A_log),
            B,
            C,
            self.D,
            self.delta_bias,
            True,
            self.orders,
            self.merge,
        )

"""An ordered list of small learners in the place of a linear layer or a feed-forward, and a gate over them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.adaptive.gating import GatingNetwork
from visionmix.kernels.exported import is_exported
from visionmix.registry import is_int

_TILE = 256  # tokens per thread, which are still in its cache when the second product reads their hidden channels


class ACM(nn.Module):
    """An adaptive computation module: the sum of the first k of N learners, with k chosen for each token.

        h_k(x) = b2_0 + sum over i = 1 ... k of  act(x W1_i + b1_i) W2_i + b2_i

    In training, k is drawn by the gate as a one-hot vector g with straight-through gradients (see `GatingNetwork`), and
    all learners run; the result is ``sum over k of g_k h_k(x)``, the masked form. In evaluation k is the gate's first
    choice, and a learner that a token does not use does not run: tokens are sorted by k, and those of one k go through
    the first k learners together, in two matrix products. Both forms agree up to rounding, and an image's result does
    not depend on the others in its batch.

    Training compiles to one graph (``torch.compile(fullgraph=True)``). In evaluation, the number of tokens of each k
    depends on the data: a compiled model has a graph break in every module, on a GPU each waits for these numbers, and
    graphs that are exported or traced hold the masked form, which skips nothing.

    Shapes: (..., in_features) to (..., out_features).

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193). Parameters have the names and shapes of
    the published code.

    Args:
        in_features: Channels of the tokens.
        out_features: Channels of the result.
        learner_dim: Hidden channels of each learner.
        num_learners: Number N of learners.
        act_layer: The activation; `torch.nn.Identity` for linear learners.
        hidden_bias: Whether there are b1, (num_learners * learner_dim).
        out_bias: Whether there are b2, ((num_learners + 1) * out_features). Without them, 0 learners give 0.
        drop: Dropout rate of the hidden channels and of the result.
        min_learners: Least k.
        gate_dims: Widths between the tokens and the gate's logits; see `GatingNetwork`.
        temperature: Of the gate's Gumbel softmax.
        released: Whether evaluation is that of the released code, where the tokens with the largest k of all in a batch
            use k - 1 learners, so that results depend on the batch.

    Attributes:
        learners: Number of learners of every token, whatever the gate says; None where the gate chooses.
        record: A list to which each pass appends the choices, as one-hot vectors (..., num_learners + 1); or None.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: a size is below 1, `min_learners` is above `num_learners`, or an option of the gate is refused.
    """

    record: list[Tensor] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        learner_dim: int,
        num_learners: int = 4,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        hidden_bias: bool = True,
        out_bias: bool = False,
        drop: float = 0.0,
        min_learners: int = 0,
        gate_dims: Sequence[int] = (),
        temperature: float = 0.8,
        released: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "learner_dim": learner_dim}
        for name, value in (sizes | {"num_learners": num_learners}).items():
            if not is_int(value):
                raise TypeError(f"{name}={value!r}: give an int")
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if is_int(min_learners) and not 0 <= min_learners <= num_learners:
            raise ValueError(f"min_learners={min_learners}: give 0 to num_learners={num_learners}")
        self.in_features, self.out_features = in_features, out_features
        self.learner_dim, self.num_learners = learner_dim, num_learners
        hidden, choices = num_learners * learner_dim, num_learners + 1
        self.w1 = nn.Parameter(torch.empty(in_features, hidden, **dd))
        self.b1 = nn.Parameter(torch.empty(hidden, **dd)) if hidden_bias else None
        self.w2 = nn.Parameter(torch.empty(hidden, out_features, **dd))
        self.b2 = nn.Parameter(torch.empty(choices * out_features, **dd)) if out_bias else None
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.gating_network = GatingNetwork(
            in_features, choices, hidden_dims=gate_dims, min_choice=min_learners, temperature=temperature, **dd
        )
        self.released = released
        self.learners: int | None = None
        self.record = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the learners' weights and biases anew, as a linear layer of PyTorch draws its own."""
        for parameter, fan_in in (
            (self.w1, self.in_features),
            (self.b1, self.in_features),
            (self.w2, self.learner_dim),
        ):
            if parameter is not None:
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        if self.b2 is not None:
            nn.init.zeros_(self.b2)

    @property
    def learner_macs(self) -> int:
        """Multiply-adds of one learner for one token."""
        return self.learner_dim * (self.in_features + self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.learners is not None:
            return self.first(x, self.learners)
        if self.training:
            gate = self.gating_network.sample(x)
            if self.record is not None:
                self.record.append(gate)
            return self.masked(x, gate)
        counts = self.choose(x)
        if self.skips:
            return self.grouped(x, counts)
        return self.masked(x, F.one_hot(counts, self.num_learners + 1))

    @property
    def skips(self) -> bool:
        """Whether a pass skips the learners that a token does not use."""
        return self.learners is None and not self.training and not is_exported()

    def choose(self, x: Tensor) -> Tensor:
        """Return the gate's first choice of k, int64 (...), for tokens (..., in_features)."""
        counts = self.gating_network(x)
        if self.released and counts.numel():
            counts = counts.minimum((counts.max() - 1).clamp(min=0))
        if self.record is not None:
            self.record.append(F.one_hot(counts, self.num_learners + 1).to(x.dtype))
        return counts

    def first(self, x: Tensor, learners: int) -> Tensor:
        """Return h_k(x), (..., out_features), with ``k = learners`` for every token."""
        width = learners * self.learner_dim
        hidden = F.linear(x, self.w1[:, :width].t(), None if self.b1 is None else self.b1[:width])
        hidden = self.drop(self.act(hidden))
        bias = None if self.b2 is None else self.b2.view(-1, self.out_features)[: learners + 1].sum(dim=0)
        return self.drop(F.linear(hidden, self.w2[:width].t(), bias))

    def prefixes(self, x: Tensor) -> Tensor:
        """Return h_0(x), ..., h_N(x) of every token, (..., num_learners + 1, out_features)."""
        hidden = self.drop(self._hidden(x)).unflatten(-1, (self.num_learners, self.learner_dim))
        each = torch.einsum("...nh,nho->...no", hidden, self.w2.unflatten(0, (self.num_learners, self.learner_dim)))
        each = F.pad(each, [0, 0, 1, 0])
        if self.b2 is not None:
            each = each + self.b2.view(-1, self.out_features)
        return self.drop(each.cumsum(dim=-2))

    def masked(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return ``sum over k of g_k h_k(x)``, (..., out_features); all learners run for every token.

        Args:
            x: Tokens, (..., in_features).
            gate: Weights g of the choices, (..., num_learners + 1), which add up to 1.
        """
        # The weight of learner i is that of all choices that use it.
        reach = gate.flip(-1).cumsum(dim=-1).flip(-1)
        hidden = self.drop(self._hidden(x)).unflatten(-1, (self.num_learners, self.learner_dim))
        reach = reach.to(hidden.dtype)
        out = (hidden * reach[..., 1:].unsqueeze(-1)).flatten(-2) @ self.w2
        if self.b2 is not None:
            out = out + reach @ self.b2.view(-1, self.out_features)
        return self.drop(out)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return h_k(x), (..., out_features), without running the learners that a token does not use.

        Args:
            x: Tokens, (..., in_features).
            counts: k of each token, int64 (...).
        """
        return _side_by_side([self], x, [counts])

    def _hidden(self, x: Tensor) -> Tensor:
        return self.act(F.linear(x, self.w1.t(), self.b1))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, learner_dim={self.learner_dim}, num_learners={self.num_learners}"


class SplitACM(nn.Module):
    """Several projections of the same tokens, an `ACM` each, with their results side by side.

    Stands for a linear layer whose rows are those of queries, keys and values. Each has a gate of its own.

    Shapes: (..., in_features) to (..., out_features), the sum of the projections'.

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193).

    Args:
        parts: The projections by name, in the order of their results.
    """

    def __init__(self, parts: dict[str, ACM]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.in_features = next(self.children()).in_features
        self.out_features = sum(part.out_features for part in self.children())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.children())
        if all(part.skips for part in parts):
            return _side_by_side(parts, x, [part.choose(x) for part in parts])
        return torch.cat([part(x) for part in parts], dim=-1)


def _side_by_side(parts: Sequence[ACM], x: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """Return the results of `parts` for tokens x (..., in_features), with `counts` (...) learners of each."""
    tokens = x.reshape(-1, x.shape[-1])
    tile = _TILE * torch.get_num_threads() if x.device.type == "cpu" else max(1, tokens.shape[0])
    out, start, width = None, 0, sum(part.out_features for part in parts)
    for part, count in zip(parts, counts, strict=True):
        stop, count = start + part.out_features, count.reshape(-1)
        groups = count.argsort().split(count.bincount(minlength=part.num_learners + 1).tolist())
        for learners in range(part.num_learners, -1, -1):
            if out is None or groups[learners].numel():
                for places in groups[learners].split(tile):
                    result = part.first(tokens.index_select(0, places), learners)
                    if out is None:
                        out = result.new_empty(tokens.shape[0], width)  # under autocast, of another type than x
                    out[:, start:stop].index_copy_(0, places, result)
        start = stop
    assert out is not None
    return out.view(*x.shape[:-1], width)

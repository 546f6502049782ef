"""Bipartite soft matching: finding the most similar tokens, and merging them to their mean."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visionmix.kernels.dispatch import full_precision
from visionmix.layers import at_least_float32
from visionmix.reduction.tokens import argsorted, rows, take
from visionmix.registry import is_int

Merge = Callable[..., Tensor]
Unmerge = Callable[[Tensor], Tensor]


def match(metric: Tensor, r: int, num_prefix_tokens: int = 0) -> tuple[Merge, Unmerge]:
    """Return functions that merge the `r` most similar pairs of tokens and that undo it.

    Tokens at even positions are set A, those at odd positions set B. Every token of A points at the token of B whose
    `metric` is the most similar to its own by the cosine; the `r` tokens of A with the highest similarity are merged
    into the tokens that they point at. Several may go to one token of B. Prefix tokens take no part.

    ``merge(x, size=None, mode="mean")`` takes tokens (batch, tokens, channels) to (batch, tokens - r, channels): each
    token is ``sum(size * x) / sum(size)`` of those merged into it, `size` (batch, tokens, 1) being one each where it is
    not given, or with ``mode="sum"`` ``sum(x)``, which is how sizes are merged. ``unmerge(y)`` goes from
    (batch, tokens - r, channels) to (batch, tokens, channels): every token gets the value of the one it is merged into.

    Order afterwards: what is left of A, then B. Without prefix tokens what is left of A lies in falling order of its
    similarity, with one it keeps the order it had, and with more they all come first. Equal similarities are ranked by
    position.

    `r` is lowered to half the number of tokens after the prefix; the choice passes no gradient to `metric`.

    Source: ToMe (Bolya et al. 2022, arXiv 2210.09461).

    Args:
        metric: Features whose similarity counts, (batch, tokens, features), floating.
        r: Tokens to remove.
        num_prefix_tokens: Tokens at the start of the sequence that are never merged (class, distillation, registers).

    Raises:
        TypeError: `metric` is no tensor, or a number no integer.
        ValueError: `metric` has other axes, or a number is negative; from the functions, the tokens are not those of
            `metric`.
    """
    if not isinstance(metric, Tensor):
        raise TypeError(f"metric is of type {type(metric).__name__}; give a tensor (batch, tokens, features)")
    if metric.ndim != 3 or not metric.is_floating_point():
        raise ValueError(
            f"metric has shape {tuple(metric.shape)} and type {metric.dtype}; it needs the three axes "
            f"(batch, tokens, features) and a floating type"
        )
    for name, number in (("r", r), ("num_prefix_tokens", num_prefix_tokens)):
        if not is_int(number) and not isinstance(number, torch.SymInt):
            raise TypeError(f"{name}={number!r} is no integer; give a number of tokens")
    if r < 0 or num_prefix_tokens < 0:
        raise ValueError(f"r={r} and num_prefix_tokens={num_prefix_tokens} must not be negative")
    batch, tokens, _ = metric.shape
    r = min(r, (tokens - num_prefix_tokens) // 2)
    if r <= 0:
        return _keep_all, _identity
    away, stay, partner = pair(metric.detach(), r, num_prefix_tokens)

    first, others, odd = _kept_order(stay, tokens, num_prefix_tokens)
    kept = torch.cat([part.expand(batch, -1) for part in (first, others, odd)], dim=1)
    gone = 2 * away
    target = stay.shape[1] + partner

    def merge(x: Tensor, size: Tensor | None = None, mode: str = "mean") -> Tensor:
        if mode not in ("mean", "sum"):
            raise ValueError(f"mode={mode!r} is unknown; give 'mean' or 'sum'")
        _check_tokens("x", x, batch, tokens)
        if mode == "sum":
            y = take(x, kept)
            return y.flatten(0, 1).index_add_(0, rows(target, y.shape[1]), take(x, gone).flatten(0, 1)).view_as(y)
        if size is None:
            size = x.new_ones(batch, tokens, 1)
            total = merge(x, mode="sum")
        else:
            total = merge(x * size, mode="sum")
        return (total / merge(size, mode="sum")).to(x.dtype)

    def unmerge(y: Tensor) -> Tensor:
        _check_tokens("y", y, batch, tokens - r)
        places = torch.arange(tokens - r, device=y.device).expand(batch, -1)
        position = places.new_empty(batch, tokens)
        position = position.scatter(1, torch.cat([kept, gone], dim=1), torch.cat([places, target], dim=1))
        return take(y, position)

    return merge, unmerge


def pair(metric: Tensor, r: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, numbered within A and B, the tokens of A that go (batch, r), those that stay, and where the former go.

    See `match` for the sets and the arguments; `r` is at most the number of tokens of A that are free.
    """
    with full_precision(metric.device):
        unit = normalize(at_least_float32(metric), dim=-1)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    # Of the prefix tokens the even positions lie in A and the odd ones in B.
    similarity[:, : (num_prefix_tokens + 1) // 2] = -torch.inf
    similarity[:, :, : num_prefix_tokens // 2] = -torch.inf
    best, partner = similarity.max(dim=2)
    ranked = argsorted(best)
    away, stay = ranked[:, :r], ranked[:, r:]
    if num_prefix_tokens:
        stay = stay.sort(dim=1).values
    return away, stay, partner.gather(1, away)


def _kept_order(stay: Tensor, tokens: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions of prefix tokens that come first, of the others of A that stay, and of the others of B."""
    leading = num_prefix_tokens if num_prefix_tokens > 1 else 0
    first = torch.arange(leading, device=stay.device)
    odd = torch.arange(1, tokens, 2, device=stay.device)[leading // 2 :]
    return first.unsqueeze(0), 2 * stay[:, (leading + 1) // 2 :], odd.unsqueeze(0)


def _check_tokens(name: str, x: Tensor, batch: int, tokens: int) -> None:
    # Graphs skip the check, which would tie them to a size.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if x.ndim != 3 or x.shape[0] != batch or x.shape[1] != tokens:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; the tokens that were matched ask for (batch={batch}, tokens={tokens}, "
            "channels)"
        )


def _keep_all(x: Tensor, size: Tensor | None = None, mode: str = "mean") -> Tensor:
    return x


def _identity(y: Tensor) -> Tensor:
    return y

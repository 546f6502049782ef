"""The losses of the three phases in which a converted model is trained, of tensors alone.

Source of all: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193), and their published code. Gates are
the choices g of a module, (batch, tokens, choices), one-hot or weights that add up to 1, as `ACM.record` has them.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.layers import at_least_float32
from visionmix.registry import check_positive, is_number


def distillation_loss(prefixes: Tensor, target: Tensor) -> Tensor:
    """Return the mean over k, tokens and channels of ``(h_k - target)^2``, a scalar.

    (The published code means to train all learners by the errors of all prefixes, as here, and takes each prefix's
    gradient to its last learner alone.)

    Args:
        prefixes: h_0, ..., h_N of each token, (..., choices, channels), as `ACM.prefixes` gives them.
        target: The result of the layer that the module replaces, (..., channels).
    """
    prefixes, target = at_least_float32(prefixes), at_least_float32(target)
    return F.mse_loss(prefixes, target.unsqueeze(-2).expand_as(prefixes))


def routing_targets(prefixes: Tensor, target: Tensor, ratio: float = 1.2) -> Tensor:
    """Return the number of learners that each token needs, int64 (...).

    With the errors ``e_k = |h_k - target|`` of k learners, it is the least k from 2 on whose learner lowers the error
    by less than `ratio`, ``e_(k-1) < ratio e_k``, and N where there is none. (The published code also takes N where
    already the first learner lowers it by less.)

    Args:
        prefixes: h_0, ..., h_N of each token, (..., choices, channels).
        target: The result of the layer that the module replaces, (..., channels).
        ratio: Factor by which one more learner must lower the error; 1.2 is published for ViT-B.

    Raises:
        TypeError: `ratio` is no number.
        ValueError: `ratio` is not above 0.
    """
    check_positive(ratio=ratio)
    errors = (at_least_float32(prefixes) - at_least_float32(target).unsqueeze(-2)).norm(dim=-1)
    most = errors.shape[-1] - 1
    enough = errors[..., 1:-1] < ratio * errors[..., 2:]
    enough = F.pad(enough, [0, 1], value=True)  # the last one is N, also of a single learner
    return (enough.int().argmax(dim=-1) + 2).clamp(max=most)


def routing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of the gate's logits (..., choices) and `routing_targets` (...), a scalar."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def budget_loss(gates: Mapping[str, Tensor], costs: Mapping[str, float], budget: float) -> Tensor:
    """Return ``|share - budget|``, a scalar, of the cost that the gates choose, as a share of all learners' cost.

        share = sum over modules m of c_m T_m mean(k) / sum over m of c_m T_m N_m

    with T the number of a module's tokens.

    Args:
        gates: Those of each module by name.
        costs: Cost c of one learner of each module for one token, in any unit.
        budget: The share to aim at, from 0 to 1.

    Raises:
        TypeError: `budget` is no number.
        ValueError: `budget` is outside of [0, 1], or there are no gates.
    """
    _check(gates)
    check_budget(budget)
    return (used_share(gates, costs) - budget).abs()


def used_share(gates: Mapping[str, Tensor], costs: Mapping[str, float]) -> Tensor:
    """Return the cost of the learners that the gates choose over that of all learners, a scalar; see `budget_loss`."""
    weights = {name: costs[name] * gate.shape[1] for name, gate in gates.items()}
    chosen = torch.stack([weights[name] * _counts(gate).mean() for name, gate in gates.items()]).sum()
    return chosen / sum(weights[name] * (gate.shape[-1] - 1) for name, gate in gates.items())


def entropy_loss(gates: Mapping[str, Tensor]) -> Tensor:
    """Return how little each image's tokens differ in their choices, from -1 (evenly spread) to 0 (all the same).

    It is ``-mean over images and modules of H(p) / log(choices)``, with p the mean of an image's gates over its tokens
    and H the entropy.

    Raises:
        ValueError: there are no gates.
    """
    _check(gates)
    each = []
    for gate in gates.values():
        share = at_least_float32(gate).mean(dim=1)
        entropy = -(share * share.clamp(min=1e-20).log()).sum(dim=-1)
        each.append((entropy / math.log(gate.shape[-1])).mean())
    return -torch.stack(each).mean()


def diversity_loss(gates: Mapping[str, Tensor]) -> Tensor:
    """Return how little images differ in their cost, a scalar of at most 0.

    It is ``-2 mean over pairs i, j of |u_i - u_j|``, pairs of an image with itself among them, with u the mean over
    modules and tokens of the number of learners over the number of choices.

    Raises:
        ValueError: there are no gates.
    """
    _check(gates)
    used = torch.stack([(_counts(gate) / gate.shape[-1]).mean(dim=1) for gate in gates.values()]).mean(dim=0)
    return -2 * (used.unsqueeze(0) - used.unsqueeze(1)).abs().mean()


def check_budget(budget: float) -> None:
    """Raise TypeError or ValueError unless `budget` is a number from 0 to 1."""
    if not is_number(budget):
        raise TypeError(f"budget={budget!r}: give a share of the learners' cost, a number from 0 to 1")
    if not 0 <= budget <= 1:
        raise ValueError(f"budget={budget}: give a share of the learners' cost, from 0 to 1")


def _counts(gate: Tensor) -> Tensor:
    """Return the number of learners of each token, (batch, tokens), with a gradient to the gate."""
    gate = at_least_float32(gate)
    return gate @ torch.arange(gate.shape[-1], device=gate.device, dtype=gate.dtype)


def _check(gates: Mapping[str, Tensor]) -> None:
    if not gates:
        raise ValueError("gates is empty: the model has no ACM whose gate chose in this pass")

"""The losses of adaptive computation against their definitions, number by number."""

import math

import pytest
import torch
from torch.nn import functional as F

from visionmix import adaptive


def drawn(seed: int = 0, batch: int = 3, tokens: int = 7, choices: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.one_hot(torch.randint(0, choices, (batch, tokens), generator=generator), choices).double()


def test_distillation_loss_equals_definition():
    prefixes, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5)
    total = sum((prefixes[:, :, k] - target).square().sum() for k in range(4))
    assert adaptive.distillation_loss(prefixes, target).item() == pytest.approx(
        total.item() / prefixes.numel(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("errors", "needed"),
    [
        ([8, 4, 2, 1, 0.5], 4),  # every learner halves the error
        ([8, 4, 2, 1.9, 0.5], 3),  # the third lowers it by less than 1.2
        ([8, 4, 3.9, 1, 0.9], 2),
        ([8, 7.9, 2, 1, 0.5], 4),  # the first one is not asked
        ([8, 4, 2, 3, 1], 3),
        ([8, 4], 1),
        ([8, 4, 3.9], 2),
        ([0, 0, 0, 0], 3),  # nothing to be gained, and nothing to divide by
    ],
)
def test_routing_targets_equal_definition(errors, needed):
    errors = torch.tensor(errors, dtype=torch.float64)
    direction = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    target = torch.randn(6, dtype=torch.float64)
    prefixes = target + errors.unsqueeze(1) * direction
    assert adaptive.routing_targets(prefixes[None, None], target[None, None]).tolist() == [[needed]]


def test_a_larger_ratio_asks_for_fewer_learners():
    prefixes, target = torch.randn(2, 50, 5, 8), torch.randn(2, 50, 8)
    needed = [adaptive.routing_targets(prefixes, target, ratio).float().mean() for ratio in (0.5, 1.0, 2.0)]
    assert needed[0] > needed[1] > needed[2]
    assert adaptive.routing_targets(prefixes, target, 1e9).unique().tolist() == [2]


def test_routing_loss_equals_cross_entropy():
    logits, targets = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    each = [-logits[i, j].log_softmax(0)[targets[i, j]] for i in range(2) for j in range(3)]
    assert adaptive.routing_loss(logits, targets).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_budget_loss_equals_definition():
    gates, costs = {"a": drawn(0), "b": drawn(1, tokens=5, choices=3)}, {"a": 10.0, "b": 4.0}
    used = most = 0.0
    for name, gate in gates.items():
        used += costs[name] * gate.argmax(-1).sum().item()
        most += costs[name] * gate.shape[0] * gate.shape[1] * (gate.shape[2] - 1)
    for budget in (0.0, 0.3, 1.0):
        loss = adaptive.budget_loss(gates, costs, budget)
        assert loss.item() == pytest.approx(abs(used / most - budget), rel=1e-6)


def test_entropy_loss_equals_definition():
    gates = {"a": drawn(0), "b": drawn(1, choices=3)}
    values = []
    for gate in gates.values():
        each = []
        for image in gate:
            shares = [count / image.shape[0] for count in image.sum(0).tolist()]
            each.append(sum(-p * math.log(p) for p in shares if p) / math.log(gate.shape[2]))
        values.append(sum(each) / len(each))
    assert adaptive.entropy_loss(gates).item() == pytest.approx(-sum(values) / 2, rel=1e-6)
    even = torch.eye(4).repeat(2, 3, 1)
    assert adaptive.entropy_loss({"a": even}).item() == pytest.approx(-1)
    assert adaptive.entropy_loss({"a": even[:, :1]}).item() == pytest.approx(0, abs=1e-6)


def test_diversity_loss_equals_definition():
    gates = {"a": drawn(0), "b": drawn(1)}
    used = [sum(gate[i].argmax(-1).double().mean().item() / 5 for gate in gates.values()) / 2 for i in range(3)]
    expected = -2 * sum(abs(a - b) for a in used for b in used) / 9
    assert adaptive.diversity_loss(gates).item() == pytest.approx(expected, rel=1e-6)
    assert adaptive.diversity_loss({"a": drawn(0, batch=1)}).item() == 0


@pytest.mark.parametrize("loss", [adaptive.entropy_loss, adaptive.diversity_loss])
def test_gradients_spread_the_choices(loss):
    weights = torch.rand(3, 7, 5, dtype=torch.float64).requires_grad_()
    value = loss({"a": weights.softmax(-1)})
    (slope,) = torch.autograd.grad(value, weights)
    with torch.no_grad():
        assert loss({"a": (weights - 0.1 * slope / slope.norm()).softmax(-1)}) < value


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adaptive.budget_loss({"a": drawn()}, {"a": 1.0}, 1.5), ValueError, "budget=1.5"),
        (lambda: adaptive.budget_loss({"a": drawn()}, {"a": 1.0}, "half"), TypeError, "budget='half'"),
        (lambda: adaptive.entropy_loss({}), ValueError, "gates is empty"),
        (lambda: adaptive.routing_targets(torch.ones(1, 3, 4), torch.ones(1, 4), 0), ValueError, "ratio=0"),
    ],
)
def test_mistakes_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()

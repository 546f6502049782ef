"""The three phases of training: each lowers its losses, trains its own parameters alone, and compiles."""

import copy
import pickle

import pytest
import timm
import torch
from tolerance import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from visionmix import adaptive

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def trained() -> nn.Module:
    """A model with weights large enough that its layers do something."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


def images(count: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def steps(model: nn.Module, count: int, loss=None, lr: float = 1e-2, teacher=None) -> list[dict[str, float]]:
    """Train by the model's own losses, and `loss` of logits and images; return the losses of every step."""
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr)
    history = []
    torch.manual_seed(0)
    model.train()
    for step in range(count):
        x = images(seed=step)
        logits, losses = model.forward_train(x)
        total = sum(losses.values()) + (loss(logits, x) if loss else 0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    model.eval()
    return history


def layer_errors(model: nn.Module, teacher: nn.Module) -> torch.Tensor:
    """The squared error of every module with every number of learners, (modules, choices)."""
    model.eval()
    with torch.no_grad():
        _, seen = adaptive.observing.observe(teacher, model, images(seed=100))
        errors = []
        for name, module in adaptive.modules(model).items():
            x, target = seen[name]
            errors.append((module.prefixes(x) - target.unsqueeze(-2)).square().mean((0, 1, 3)))
        return torch.stack(errors)


@pytest.fixture(scope="module")
def distilled() -> tuple[nn.Module, nn.Module]:
    teacher = trained()
    model = adaptive.convert(teacher, out_bias=True, min_learners=1)
    steps(adaptive.in_phase(model, "distill", copy.deepcopy(teacher)), 80)
    adaptive.set_learners(model, None)
    return model, teacher


def test_distillation_brings_every_number_of_learners_near_the_layer(distilled):
    model, teacher = distilled
    before = layer_errors(adaptive.convert(teacher, out_bias=True), teacher)
    after = layer_errors(model, teacher)
    assert (after[:, 1:] < 0.8 * before[:, 1:]).all()
    assert (after[:, 1:] < after[:, :-1]).all()  # each learner adds something
    adaptive.set_learners(model, 4)
    near = F.mse_loss(model(images(seed=101)), teacher(images(seed=101)))
    adaptive.set_learners(model, 1)
    far = F.mse_loss(model(images(seed=101)), teacher(images(seed=101)))
    adaptive.set_learners(model, None)
    assert near < far


def test_distillation_losses_equal_the_losses_of_single_layers():
    teacher = trained()
    model = adaptive.convert(teacher)
    logits, losses = adaptive.distillation_losses(model, teacher, images())
    assert torch.equal(logits, teacher(images()))
    each = []
    x = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(images())))
    for block, adapted in zip(teacher.blocks, model.blocks, strict=True):
        normed = block.norm1(x)
        qkv = block.attn.qkv(normed)
        for part, target in zip(
            (adapted.attn.qkv.q, adapted.attn.qkv.k, adapted.attn.qkv.v), qkv.chunk(3, -1), strict=True
        ):
            each.append(adaptive.distillation_loss(part.prefixes(normed), target))
        q, k, v = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        each.append(adaptive.distillation_loss(adapted.attn.proj.prefixes(mixed), block.attn.proj(mixed)))
        x = x + block.attn.proj(mixed)
        each.append(adaptive.distillation_loss(adapted.mlp.prefixes(block.norm2(x)), block.mlp(block.norm2(x))))
        x = x + block.mlp(block.norm2(x))
    assert_close(losses["distillation"], torch.stack(each).mean())
    assert not teacher.blocks[0].mlp._forward_hooks


def test_routing_learns_the_targets(distilled):
    model, teacher = copy.deepcopy(distilled[0]), distilled[1]
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def hits() -> float:
        _, seen = adaptive.observing.observe(teacher, model, images(seed=100))
        right = []
        for name, module in adaptive.modules(model).items():
            x, target = seen[name]
            needed = adaptive.routing_targets(module.prefixes(x), target)
            right.append((module.gating_network(x) == needed).float().mean())
        return torch.stack(right).mean().item()

    before = hits()
    history = steps(adaptive.in_phase(model, "route", teacher), 60)
    assert history[-1]["routing"] < 0.8 * history[0]["routing"]
    assert hits() > before + 0.2
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]) == ("gating_network" not in name), name


@pytest.mark.parametrize("budget", [0.3, pytest.param(0.8, marks=pytest.mark.long)])
def test_finetuning_reaches_the_budget(distilled, budget):
    model = copy.deepcopy(distilled[0])
    assert abs(adaptive.usage(model, images(32, seed=100)).share - budget) > 0.05
    options = {"budget_weight": 10.0, "entropy_weight": 0.0, "diversity_weight": 0.0}
    history = steps(adaptive.in_phase(model, "finetune", budget=budget, **options), 80, lr=3e-3)
    assert list(history[0]) == ["budget"]
    assert adaptive.usage(model, images(32, seed=100)).share == pytest.approx(budget, abs=0.08)


@pytest.mark.parametrize("name", ["entropy", "diversity"])
def test_finetuning_spreads_the_choices(name):
    model = adaptive.convert(trained(), layers=["*.mlp"])
    for module in adaptive.modules(model).values():
        nn.init.constant_(module.gating_network.fc.bias[1], 3.0)  # at first, nearly all choose it
    weights = {"budget_weight": 0.0, "entropy_weight": 0.0, "diversity_weight": 0.0, f"{name}_weight": 1.0}
    history = steps(adaptive.in_phase(model, "finetune", budget=0.5, **weights), 40)
    first, last = (sum(losses[name] for losses in part) / 5 for part in (history[:5], history[-5:]))
    assert list(history[0]) == [name]
    assert last < 1.3 * first < 0


def test_finetuning_losses_equal_the_losses_of_the_gates(distilled):
    model = copy.deepcopy(distilled[0]).train()
    torch.manual_seed(5)
    logits, losses = adaptive.finetuning_losses(model, images(), 0.4)
    torch.manual_seed(5)
    with adaptive.observing.recorded(model) as record:
        assert torch.equal(model(images()), logits)
    gates = {name: gate[0] for name, gate in record.items()}
    costs = {name: module.learner_dim * 2 * 32 for name, module in adaptive.modules(model).items()}
    assert_close(losses["budget"], 0.1 * adaptive.budget_loss(gates, costs, 0.4))
    assert_close(losses["entropy"], 0.05 * adaptive.entropy_loss(gates))
    assert_close(losses["diversity"], 0.05 * adaptive.diversity_loss(gates))
    assert all(module.record is None for module in adaptive.modules(model).values())


def test_the_labels_teach_the_gates():
    model = adaptive.in_phase(adaptive.convert(trained()), "finetune", budget=0.5).train()
    logits, _ = model.forward_train(images())
    F.cross_entropy(logits, torch.arange(8) % 5).backward()
    for module in adaptive.modules(model).values():
        assert module.gating_network.fc.weight.grad.abs().sum() > 0


def test_usage_is_what_runs(distilled):
    model = copy.deepcopy(distilled[0]).train()
    model.blocks[1].eval()
    used = adaptive.usage(model, images())
    assert model.training
    assert not model.blocks[1].training
    found = adaptive.modules(model)
    assert used.modules.keys() == found.keys()
    total = sum(module.num_learners * module.learner_macs for module in found.values())
    by_modules = sum(used.modules[name] * module.num_learners * module.learner_macs for name, module in found.items())
    assert used.share == pytest.approx(by_modules / total, rel=1e-5)

    def flops(learners) -> int:
        adaptive.set_learners(model.eval(), learners)
        with FlopCounterMode(display=False) as counter:
            model(images())
        return counter.get_total_flops()

    gates = 2 * 8 * 17 * sum(module.in_features * (5 - module.gating_network.min_choice) for module in found.values())
    none, whole, gated = flops(0), flops(4), flops(None)
    assert (gated - gates - none) / (whole - none) == pytest.approx(used.share, rel=1e-5)


def test_a_phase_trains_its_own_parameters_alone():
    teacher = trained()
    model = adaptive.convert(teacher)
    gates = {name for name, _ in model.named_parameters() if "gating_network" in name}
    learners = {f"{name}.{leaf}" for name in adaptive.modules(model) for leaf in ("w1", "b1", "w2")}
    everything = {name for name, _ in model.named_parameters()}
    wanted = {"distill": learners, "route": gates, "finetune": everything}
    for phase, names in wanted.items():
        options = {"budget": 0.5} if phase == "finetune" else {"teacher": copy.deepcopy(teacher)}
        new = adaptive.in_phase(model, phase, **options).train()
        logits, losses = new.forward_train(images())
        (sum(losses.values()) + F.cross_entropy(logits, torch.arange(8) % 5)).backward()
        assert {name for name, value in new.named_parameters() if value.requires_grad} == names
        assert {name for name, value in new.named_parameters() if value.grad is not None} == names
        assert new.state_dict().keys() == model.state_dict().keys()
        new.zero_grad()


def test_models_in_a_phase_are_copied_moved_and_pickled():
    teacher = trained()
    new = adaptive.in_phase(adaptive.convert(teacher), "distill", copy.deepcopy(teacher))
    assert isinstance(new, type(teacher))
    expected = new.forward_train(images())[1]["distillation"]
    for copied in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), adaptive.in_phase(new, "distill", teacher)):
        assert torch.equal(copied.forward_train(images())[1]["distillation"], expected)
    logits, losses = new.double().forward_train(images().double())
    assert logits.dtype == losses["distillation"].dtype == torch.float64
    assert not any("teacher" in name for name in new.state_dict())


@pytest.mark.parametrize("phase", ["distill", pytest.param("route", marks=pytest.mark.long), "finetune"])
def test_training_compiles(phase):
    teacher = trained()
    options = {"budget": 0.5} if phase == "finetune" else {"teacher": copy.deepcopy(teacher)}
    model = adaptive.in_phase(adaptive.convert(teacher), phase, **options).train()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_train, backend="eager", fullgraph=phase == "finetune")
    found = []
    for run in (compiled, model.forward_train):
        torch.manual_seed(0)
        logits, losses = run(images())
        (sum(losses.values()) + logits.mean()).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)


def test_checkpointing_gives_the_same_losses(distilled):
    found = []
    for checkpointing in (False, True):
        model = adaptive.in_phase(copy.deepcopy(distilled[0]), "finetune", budget=0.5).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        logits, losses = model.forward_train(images())
        (logits.sum() + sum(losses.values())).backward()
        found.append([*losses.values(), model.blocks[0].mlp.gating_network.fc.weight.grad, model.blocks[0].mlp.w1.grad])
    for plain, again in zip(*found, strict=True):
        assert_close(again, plain)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, t: adaptive.in_phase(m, "train"), ValueError, "phase='train': give one of 'distill'"),
        (lambda m, t: adaptive.in_phase(m, "distill"), ValueError, "needs the model that was converted"),
        (lambda m, t: adaptive.in_phase(m, "finetune", t, budget=0.5), ValueError, "has no use for a teacher"),
        (lambda m, t: adaptive.in_phase(m, "finetune"), TypeError, "budget is missing"),
        (lambda m, t: adaptive.in_phase(m, "finetune", budget=2), ValueError, "budget=2"),
        (lambda m, t: adaptive.in_phase(m, "finetune", budget=1, entropy_weight=-1), ValueError, "entropy_weight=-1"),
        (lambda m, t: adaptive.in_phase(m, "distill", t, ratio=1.2), TypeError, "ratio=1.2 is no option"),
        (lambda m, t: adaptive.in_phase(m, "route", t, ratio=0), ValueError, "ratio=0"),
        (lambda m, t: adaptive.in_phase(t, "distill", t), ValueError, "has no ACM"),
        (lambda m, t: adaptive.distillation_losses(m, t.train(), images()), ValueError, "teacher is in training mode"),
        (
            lambda m, t: adaptive.distillation_losses(m, nn.Identity().eval(), images()),
            ValueError,
            "has no layer blocks",
        ),
        (lambda m, t: adaptive.finetuning_losses(m, images(), 0.5, budget_weight="1"), TypeError, "budget_weight='1'"),
        (lambda m, t: (adaptive.set_learners(m, 2), adaptive.usage(m, images())), ValueError, "learners=2 for all"),
    ],
)
def test_mistakes_are_refused(call, error, match):
    teacher = trained()
    with pytest.raises(error, match=match):
        call(adaptive.convert(teacher), teacher)

"""The plan of a training run: what is counted against real tensors and definitions, what is assumed by hand."""

import argparse
import dataclasses
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed.run
import yaml
from memory import PeakMemory
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from visionmix.tools import info, models, plan, recipe, step_cost, step_time, timing, train
from visionmix.tools.data import Batch
from visionmix.tools.trainer import Trainer

NO_CLIPPING = recipe.from_dict({"optimizer": {"clip_grad": None}}, "test").optimizer
CLUSTER = Path(__file__).parents[2] / "configs" / "cluster"


def made(name: str, batch: int, size: int, **train_options) -> recipe.Recipe:
    """Return a recipe of a model that is built for its size."""
    tree = {"model": {"name": name}, "data": {"image_size": size, "batch_size": batch}, "train": train_options}
    return recipe.from_dict(tree, "test")


COSTS: dict[tuple, step_cost.StepCost] = {}


def count(run: recipe.Recipe, batch: int, **options) -> step_cost.StepCost:
    """Return what `step_cost.count` does, counted once: counting takes seconds, and tests ask for the same steps."""
    options = {"checkpointing": False, "foreach": True} | options
    parts = (repr(getattr(run, name)) for name in ("model", "augment", "optimizer", "train", "distill"))
    key = (*parts, run.data.image_size, batch, *sorted(options.items()))
    if key not in COSTS:
        COSTS[key] = step_cost.count(run, batch, **options)
    return COSTS[key]


@pytest.fixture(autouse=True)
def counts_once(monkeypatch):
    for module in (plan, step_time):
        monkeypatch.setattr(module, "count", count)


def counted(name: str, batch: int, size: int, checkpointing: bool = False, foreach: bool = True, **train_options):
    """Return the cost of a step of `made`'s recipe."""
    options = {"classes": 1000, "checkpointing": checkpointing, "foreach": foreach}
    return count(made(name, batch, size, **train_options), batch, **options)


def calls_of(function) -> list[step_cost.Call]:
    with step_cost._Counter() as counter:
        function()
    return counter.take()


def test_ops_are_counted_by_hand():
    x, weight, bias = torch.randn(5, 8), torch.randn(8, 6), torch.randn(6)
    (product,) = calls_of(lambda: x @ weight)
    assert (product.flops, product.moved) == (2 * 5 * 8 * 6, 4 * (5 * 8 + 8 * 6 + 5 * 6))
    (broadcast,) = calls_of(lambda: x[:, :6] + bias.expand(5, 6))
    assert (broadcast.flops, broadcast.moved) == (0, 4 * (30 + 6 + 30))
    (in_place,) = calls_of(lambda: x.mul_(2.0))
    assert in_place.moved == 4 * (40 + 40)
    (filled,) = calls_of(lambda: x.zero_())
    assert filled.moved == 4 * 40
    (half,) = calls_of(lambda: weight.bfloat16())
    assert (half.moved, half.half) == (48 * 4 + 48 * 2, False)
    assert not calls_of(lambda: (x.view(8, 5).t()[1:], x.detach(), torch.empty(3)))
    assert calls_of(lambda: torch._foreach_add_([x, weight], 1.0))[0].moved == 2 * 4 * (40 + 48)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_count_each_of_their_gradients_as_the_forward_pass(layer, groups):
    """Multiply-adds by the definition: every input and output channel of a group, at every place of the kernel."""
    convolution = layer(8, 16, 3, stride=2, groups=groups, bias=False)
    images = torch.randn(2, 8, 9, 9, requires_grad=True)
    out = convolution(images)
    places = (images if layer is nn.ConvTranspose2d else out)[:, 0].numel()
    macs = places * 9 * (8 // groups) * (16 // groups) * groups
    (backward,) = [call for call in calls_of(lambda: out.sum().backward()) if call.flops]
    assert backward.flops == 2 * 2 * macs


def test_the_forward_pass_has_the_flops_that_info_prints():
    cost = counted("test_vig", 4, 96)
    macs = info.measure(timm.create_model("test_vig"), (3, 96, 96)).macs
    assert sum(call.flops for call in cost.forward) == 4 * 2 * sum(macs.values())


def real_step(name: str, batch: int, size: int, checkpointing: bool) -> dict[str, int]:
    """Return the memory of a training step that is really computed."""
    model = timm.create_model(name, num_classes=1000).train()
    if checkpointing:
        model.set_grad_checkpointing(True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    images, targets = torch.randn(batch, 3, size, size), torch.rand(batch, 1000).softmax(1)
    weights = [*model.parameters(), *model.buffers()]
    known = {x.untyped_storage().data_ptr() for x in weights}
    saved: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with PeakMemory() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = F.cross_entropy(model(images), targets)
    activations = sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in known)
    forward_peak = memory.peak
    saved.clear()
    with PeakMemory() as memory:
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
    optimizer.step()
    state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return {
        "parameters": sum(x.nbytes for x in weights),
        "gradients": sum(x.grad.untyped_storage().nbytes() for x in model.parameters()),
        "optimizer": sum(x.nbytes for x in state),
        "activations": activations,
        "forward_peak": forward_peak,
        "step_peak": memory.peak,
    }


@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [
        ("test_vig", 4, 96),
        pytest.param("vig_t", 2, 64, marks=pytest.mark.long),
        ("test_vmamba", 3, 96),
        pytest.param("test_dinat", 3, 96, marks=pytest.mark.long),
        ("test_vit", 1, 160),
    ],
)
def test_memory_is_that_of_a_real_step(name, batch, size):
    cost = counted(name, batch, size, foreach=False)
    real = real_step(name, batch, size, checkpointing=False)
    for kind in ("parameters", "gradients", "optimizer"):
        assert getattr(cost, kind) == real[kind]
    assert cost.activations == pytest.approx(real["activations"], rel=0.15)
    images = 4 * batch * 3 * size**2  # made before the real step is watched
    assert max(cost.forward_peak, cost.backward_peak) == pytest.approx(real["step_peak"] + images, rel=0.15)
    whole = real["parameters"] + real["optimizer"] + real["step_peak"] + images
    assert cost.peak() == pytest.approx(whole, rel=0.15)


def test_checkpointing_saves_what_it_saves_in_a_real_step():
    costs = [counted("test_vig", 4, 96, checkpointing=each) for each in (False, True)]
    real = real_step("test_vig", 4, 96, checkpointing=True)
    images = 4 * 4 * 3 * 96**2
    assert max(costs[1].forward_peak, costs[1].backward_peak) == pytest.approx(real["step_peak"] + images, rel=0.15)
    assert costs[1].activations < costs[0].activations / 3
    flops = [sum(call.flops for call in cost.backward) for cost in costs]
    forward = sum(call.flops for call in costs[0].forward)
    assert flops[0] < flops[1] <= flops[0] + forward


TEACHER = {"teacher": "test_vit", "kind": "features"}


def trained_step(monkeypatch, **sections) -> dict[str, int]:
    """Return the memory of a step that `visionmix train` really makes, the second, and what lasts between steps."""
    teacher = timm.create_model("test_vit").eval()
    settings = models.model_input(teacher, image_size=160)
    monkeypatch.setattr(
        models, "load_trained", lambda *_, **__: models.Trained(teacher, "test_vit", None, settings, None)
    )
    tree = {"model": {"name": "test_vit"}, "data": {"image_size": 160, "batch_size": 4}}
    run = recipe.from_dict({**tree, **sections, "train": {"label_smoothing": 0.0, **sections["train"]}}, "test")
    trainer = Trainer(run, [str(number) for number in range(1000)], 10, torch.device("cpu"))
    for group in trainer.optimizer.param_groups:
        group["foreach"] = False
    batch = Batch(torch.randint(256, (4, 3, 160, 160), dtype=torch.uint8), torch.arange(4), [], 0)

    def step() -> None:
        for _ in range(run.train.accumulate):
            trainer._update(batch)

    step()
    with PeakMemory() as memory:
        step()
    kept = [*trainer.model.parameters(), *trainer.model.buffers()]
    if trainer.ema:
        kept += [*trainer.ema.module.parameters(), *trainer.ema.module.buffers()]
    if trainer.teacher:
        kept += [*teacher.parameters(), *teacher.buffers()]
    state = [x for values in trainer.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    cost = count(run, 4, classes=1000, checkpointing=run.train.checkpointing, foreach=False)
    return {"real": sum(x.nbytes for x in [*kept, *state]) + memory.peak, "planned": cost.peak(), "cost": cost}


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"train": {}}, marks=pytest.mark.long),
        pytest.param({"train": {"accumulate": 3}}, marks=pytest.mark.long),
        pytest.param({"train": {"amp": "pure_bfloat16", "ema_decay": 0.9}}, marks=pytest.mark.long),
        pytest.param({"train": {"checkpointing": True}}, marks=pytest.mark.long),
        {"train": {}, "distill": TEACHER},
        {"train": {"amp": "pure_bfloat16", "accumulate": 2, "checkpointing": True}},
    ],
    ids=["plain", "accumulate", "pure_bfloat16", "checkpointing", "teacher", "together"],
)
def test_the_peak_is_that_of_a_step_of_the_trainer(sections, monkeypatch):
    found = trained_step(monkeypatch, **sections)
    assert found["planned"] == pytest.approx(found["real"], rel=0.15)


def test_a_step_of_several_batches_computes_each_and_updates_once():
    one, three = (counted("test_vig", 4, 96, accumulate=times) for times in (1, 3))
    for name in ("forward", "backward"):
        flops = [sum(call.flops for call in getattr(cost, name)) for cost in (one, three)]
        assert flops[1] == 3 * flops[0]
    assert three.update == one.update
    assert three.activations == one.activations
    assert one.backward_peak < three.backward_peak <= one.backward_peak + one.gradients
    assert len(three.backward) > 3 * len(one.backward)  # gradients are added to those of the first batch


def test_a_teacher_is_another_forward_pass_and_its_weights():
    tree = {"model": {"name": "test_vig"}, "data": {"image_size": 160}}
    plain = count(recipe.from_dict(tree, "test"), 2, classes=1000)
    taught = count(recipe.from_dict({**tree, "distill": TEACHER}, "test"), 2, classes=1000)
    macs = info.measure(timm.create_model("test_vit"), (3, 160, 160)).macs
    assert sum(call.flops for call in taught.teacher) == 2 * 2 * sum(macs.values())
    assert taught.given == sum(4 * value.numel() for value in timm.create_model("test_vit").parameters())
    assert (taught.forward, taught.backward, plain.teacher) == (plain.forward, plain.backward, [])
    step = step_time.estimate(taught, DEVICE, ASSUMED)
    assert step.parts["teacher"].flops == sum(call.flops for call in taught.teacher)
    assert step.seconds > step_time.estimate(plain, DEVICE, ASSUMED).seconds
    nameless = recipe.from_dict({**tree, "distill": {"checkpoint": "a.pt"}}, "test")
    with pytest.raises(ValueError, match=r"distill.checkpoint='a.pt' is not read for a plan; name its model by --set"):
        count(nameless, 2, classes=1000)


def test_pure_bfloat16_halves_weights_gradients_and_state_but_not_the_average():
    options = {"ema_decay": 0.9}
    single = counted("test_vit", 2, 160, **options)
    half = counted("test_vit", 2, 160, amp="pure_bfloat16", **options)
    assert (2 * half.parameters, 2 * half.gradients) == (single.parameters, single.gradients)
    assert half.optimizer == pytest.approx(single.optimizer / 2, rel=0.01)
    assert half.average == single.average
    assert all(call.half for call in half.forward if call.flops)


def test_the_recipes_accumulation_and_checkpointing_are_planned(capsys):
    status, shown = show(capsys, "--gpus", "2", "--batch", "24", "--set", "train.accumulate=3")
    assert status == 0
    assert "24 images a step in 3 batches, 4 a GPU" in shown
    cost = counted("test_vig", 4, 96, accumulate=3)
    step = step_time.estimate(cost, plan.DEVICES["h100"], plan.GPU, gpus=2)
    assert f"step {step.seconds * 1e3:.2f}" in shown
    assert f"images a second {24 / step.seconds:,.0f}," in shown
    _, shown = show(capsys, "--batch", "4", "--set", "train.checkpointing=true")
    assert "4 a GPU, activation checkpointing" in shown


def test_mixed_precision_keeps_activations_in_half_the_bytes():
    costs = {amp: counted("test_vit", 8, 160, amp=amp)
             for amp in ("none", "bfloat16")}  # fmt: skip
    assert costs["bfloat16"].activations < 0.75 * costs["none"].activations
    products = [call for call in costs["bfloat16"].forward if call.flops]
    assert all(call.half for call in products)
    assert not any(call.half for call in costs["none"].forward)


def test_moving_average_clipping_and_optimisers_are_counted():
    tree = {"model": {"name": "test_vig"}, "data": {"image_size": 96}, "optimizer": {"name": "sgd"}}
    plain = count(recipe.from_dict(tree, "test"), 2, classes=1000)
    tree["optimizer"] = {"name": "adamw", "clip_grad": 1.0}
    tree["train"] = {"ema_decay": 0.9}
    full = count(recipe.from_dict(tree, "test"), 2, classes=1000)
    assert (plain.optimizer, plain.average) == (plain.gradients, 0)  # timm's sgd has momentum
    assert full.average == full.parameters
    assert 2 * full.gradients <= full.optimizer < 2.01 * full.gradients
    assert full.update[-1].moved == 3 * full.parameters
    assert sum(call.moved for call in full.update) > sum(call.moved for call in plain.update) + 3 * full.parameters


DEVICE = plan.Device(half=100.0, single=10.0, bandwidth=8.0, memory=1e9, link=6.0, network=0.5, source="made up")
ASSUMED = plan.Assumed(compute=0.5, memory=0.25, fused=0.1, link=0.5, overlap=0.5, launch=1.0, usable=0.9)


def test_each_op_takes_the_longer_of_its_flops_and_its_bytes():
    calls = [
        step_cost.Call("aten.mm", flops=100, moved=2, half=True),  # 100 / 50 beside 2 / 2
        step_cost.Call("aten.mm", flops=100, moved=2),  # 100 / 5
        step_cost.Call("aten.add", flops=0, moved=6),  # 6 / 2
        step_cost.Call("visionmix.selective_scan", flops=0, moved=4, half=True),  # 4 / 0.8
    ]
    part = step_time.part(calls, DEVICE, ASSUMED, serial=False)
    assert (part.flops, part.moved) == (200, 14)
    assert (part.device, part.host, part.seconds) == pytest.approx((2 + 20 + 3 + 5, 4, 30))
    assert step_time.part(calls, DEVICE, ASSUMED, serial=True).seconds == pytest.approx(34)
    slow = dataclasses.replace(ASSUMED, launch=20.0)
    assert step_time.part(calls, DEVICE, slow, serial=False).seconds == pytest.approx(80)


def test_calls_that_a_cache_holds_take_its_rate():
    device = dataclasses.replace(DEVICE, cached=((100, 80.0), (1000, 20.0)))
    assert [device.rate(moved) for moved in (100, 101, 1000, 1001)] == [80, 20, 20, DEVICE.bandwidth]
    (small, large) = (step_cost.Call("small", 0, 100), step_cost.Call("large", 0, 1600))
    assert step_time.part([small], device, ASSUMED, serial=False).seconds == pytest.approx(1.25 / 0.25)
    assert step_time.part([large], device, ASSUMED, serial=False).seconds == pytest.approx(200 / 0.25)


def test_all_reduce_in_a_node_between_nodes_and_hidden():
    assert step_time.all_reduce(30, 1, 8, DEVICE, ASSUMED) == 0
    assert step_time.all_reduce(30, 4, 8, DEVICE, ASSUMED) == pytest.approx(2 * 3 / 4 * 30 / (6 * 0.5))
    assert step_time.all_reduce(30, 16, 8, DEVICE, ASSUMED) == pytest.approx(2 * 15 / 16 * 30 / (8 * 0.5 * 0.5))
    backward = [step_cost.Call("aten.add", flops=0, moved=20)]  # 10 seconds, of which half hides
    cost = step_cost.StepCost([], backward, [], 0, gradients=30, optimizer=0, average=0, activations=0,
                              forward_peak=0, backward_peak=0, update_peak=0)  # fmt: skip
    step = step_time.estimate(cost, DEVICE, ASSUMED, gpus=4)
    assert step.exposed == pytest.approx(15 - 5)
    assert step.seconds == pytest.approx(10 + 10)
    assert step_time.estimate(cost, DEVICE, ASSUMED, gpus=1).exposed == 0


def test_the_peak_holds_gradients_in_the_update_and_buffers_between_replicas():
    cost = step_cost.StepCost([], [], [], parameters=7, gradients=5, optimizer=3, average=2, activations=20,
                              forward_peak=21, backward_peak=24, update_peak=1)  # fmt: skip
    assert cost.peak() == 7 + 3 + 2 + 24
    assert dataclasses.replace(cost, update_peak=22, given=4).peak() == 7 + 3 + 2 + 4 + 22 + 5
    assert cost.peak(replicas=2) == cost.peak() + 5


@pytest.mark.parametrize("limit", [0, 9, 10, 99, 100, 101, 365, 1000])
def test_largest_batch(limit):
    def peak(batch):
        return max(10 + 3 * batch, 4 + 7 * batch, 90 + 2 * batch if batch > 30 else 0)

    wanted = max((batch for batch in range(1, 400) if peak(batch) <= limit), default=0)
    assert plan.largest_batch(peak, 400, limit) == wanted


def test_a_model_brings_its_packaged_recipe():
    found, source = plan.read_recipe("vig_b", None, {"schedule": {"epochs": 30}}, [])
    assert source == "imagenet/vig_b.yaml"
    assert (found.model.kwargs, found.schedule.epochs) == ({"drop_path_rate": 0.5}, 30)
    found, source = plan.read_recipe("test_vig", None, {}, [])
    assert (source, found.schedule.epochs, found.data.image_size) == ("the default settings", 300, 96)
    found, _ = plan.read_recipe("test_vmamba", None, {}, ["data.image_size=64"])
    assert found.data.image_size == 64
    found, _ = plan.read_recipe("vig_t", "imagenet/vig_s.yaml", {}, ["optimizer.name=lamb"])
    assert (found.model.name, found.optimizer.weight_decay, found.optimizer.name) == ("vig_t", 0.1, "lamb")


def show(capsys, *arguments: str) -> tuple[int, str]:
    status = plan.main(["test_vig", *arguments])
    return status, " ".join(capsys.readouterr().out.replace("│", " ").replace("┃", " ").split())


def test_prints_a_plan(capsys):
    status, shown = show(
        capsys, "--gpus", "16", "--gpu", "a100", "--batch", "64", "--epochs", "30", "--image-kb", "100"
    )
    assert status == 0
    assert "16 x a100, 64 images a step, 4 a GPU" in shown
    cost = counted("test_vig", 4, 96)
    step = step_time.estimate(cost, plan.DEVICES["a100"], plan.GPU, gpus=16)
    assert f"step {step.seconds * 1e3:.2f}" in shown
    rate = 64 / step.seconds
    assert f"images a second {rate:,.0f}, {rate / 16:,.1f} a GPU" in shown
    assert f"data rate {rate * 0.1:,.0f} MB a second at 100 kB an image" in shown
    test = step.parts["forward"].seconds * 782  # 50,000 images
    hours = 30 * (1_281_167 // 64 * step.seconds + test) / 3600
    assert f"hours {hours:,.2f}, {hours * 16:,.1f} GPU-hours" in shown
    assert "epochs 30 of 1,281,167 images, 20,018 steps each" in shown
    for stated in (
        "NVIDIA A100",
        "link 300 GB/s, network 25 GB/s a GPU, 8 GPUs a node.",
        "--compute 0.7",
        "--memory 0.55",
        "--launch 4e-05",
        "activation checkpointing",
    ):
        assert stated in shown


def test_options_change_what_is_assumed(capsys):
    _, shown = show(capsys, "--batch", "4", "--launch", "0.01", "--overlap", "0")
    assert "--launch 0.01" in shown
    calls = counted("test_vig", 4, 96)
    host = sum(len(getattr(calls, name)) for name in ("forward", "backward", "update")) * 0.01
    assert f"step {host * 1e3:.2f}" in shown


@pytest.mark.long
def test_a_batch_that_does_not_fit_is_refused_with_the_largest_that_does(capsys, monkeypatch):
    def cost(batch, checkpointing=False):
        return counted("test_vig", batch, 96, checkpointing=checkpointing)

    limit = (cost(12).peak(2) + cost(13).peak(2)) / 2
    assert limit > cost(14, checkpointing=True).peak(2)
    small = dataclasses.replace(plan.DEVICES["h100"], memory=limit / plan.GPU.usable)
    monkeypatch.setitem(plan.DEVICES, "h100", small)
    status, shown = show(capsys, "--gpus", "2", "--batch", "28")
    assert status == 1
    assert "DOES NOT FIT" in shown
    assert "the largest batch is 12 a GPU, 24 in all" in shown
    assert "With --checkpointing this batch fits." in shown
    assert show(capsys, "--gpus", "2", "--batch", "28", "--checkpointing")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vig_x"], r"model='vig_x' is not known \(did you mean 'vig_\w'\?\)"),
        (["vig_t", "--gpu", "h10"], r"gpu='h10' is not known \(did you mean 'h100'\?\); choose one of a100, h100"),
        (["vig_t", "--recipe", "imagenet/vig_q.yaml"], r"there is no recipe 'imagenet/vig_q.yaml'.*did you mean 'im"),
        (["vig_t", "--batch", "100", "--gpus", "16"], r"batch=100 is not divisible by gpus=16; give 96 or 112"),
        (["vig_t", "--batch", "3", "--gpus", "16"], r"batch=3 is not divisible by gpus=16; give 16$"),
        (["vig_t", "--batch", "100", "--gpus", "8", "--set", "train.accumulate=3"],
         r"batch=100 is not divisible by gpus=8 x train.accumulate=3; give 96 or 120"),
        (["vig_t", "--gpus", "0"], r"gpus=0 is too small; it must be at least 1"),
        (["vig_t", "--batch", "0"], r"batch=0 is too small"),
        (["vig_t", "--epochs", "0"], r"schedule.epochs=0"),
        (["vig_t", "--amp", "bf16"], r"train.amp='bf16' is not one of none, float16, bfloat16"),
        (["vig_t", "--gpu", "cpu", "--gpus", "2"], r"gpus=2 with gpu='cpu'"),
        (["vig_t", "--compute", "1.5"], r"compute=1.5 is out of range; give a share between 0 and 1"),
        (["vig_t", "--memory", "nan"], r"memory=nan is out of range"),
        (["vig_t", "--launch", "-1"], r"launch=-1 is out of range; give 0 or more seconds"),
        (["vig_t", "--image-kb", "0"], r"image_kb=0 is not a size"),
        (["vig_t", "--images", "100"], r"images=100 are fewer than a step of batch=128 takes"),
        (["vig_t", "--set", "model.name=vig_s"], r"the command line also gives model.name='vig_t'"),
        (["vig_t", "--batch", "8", "--set", "data.batch_size=4"], r"the command line also gives data.batch_size=8"),
        (["vig_t", "--set", "optimizer.nam=sgd"], r"optimizer.nam='sgd' is not a key"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(arguments, message, capsys, monkeypatch):
    def work(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(plan, "count", work)
    monkeypatch.setattr(plan, "cpu", work)
    with pytest.raises(SystemExit) as caught:
        plan.main(arguments)
    assert caught.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "optimizer.name=adamx"], "optimizer.name='adamx' is not one of timm.optim.list_optimizers()"),
        (["--set", "optimizer.name=adamp"], "optimizer.name='adamp' cannot be counted without data"),
        (["--set", "optimizer.kwargs.moment=1"], "does not take kwargs={'moment': 1}"),
        (["--set", "model.kwargs.depht=1"], "does not take these arguments"),
        (["--img-size", "8"], "does not take RGB images of image_size=8"),
    ],
)
def test_a_recipe_that_cannot_be_made_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        plan.main(["test_vig", *arguments])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_checkpointing_says_so(capsys):
    with pytest.raises(SystemExit):
        plan.main(["dla46x_c", "--img-size", "64", "--checkpointing"])
    assert "has no activation checkpointing; leave --checkpointing out" in capsys.readouterr().err


def test_this_cpu_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(timing, "quick_limits", lambda *_: (8e9, 50e9))
    monkeypatch.setattr(timing, "copy_rates", lambda sizes: dict.fromkeys(sizes, 20e9))
    monkeypatch.setattr(timing, "fastest", lambda *_: 6.0)
    status, shown = show(capsys, "--gpu", "cpu", "--batch", "4")
    assert status == 0
    factor = float(re.search(r"measured now, times ([\d.]+) by a step of swin_tiny", shown)[1])
    single, bandwidth = map(float, re.search(r"([\d.]+) in float32, memory ([\d.]+) GB/s\.", shown).groups())
    assert single == pytest.approx(0.05 * factor, rel=0.03)  # both are rounded
    assert bandwidth == pytest.approx(8 * factor, rel=0.03)
    assert "all-reduce buffers 0.00" in shown


@pytest.mark.parametrize(
    "amp", ["none", *(pytest.param(amp, marks=pytest.mark.long) for amp in ("bfloat16", "pure_bfloat16"))]
)
def test_the_rates_of_a_cpu_estimate_the_step_that_corrects_them(amp, monkeypatch):
    monkeypatch.setattr(timing, "quick_limits", lambda *_: (8e9, 50e9))
    monkeypatch.setattr(timing, "copy_rates", lambda sizes: dict.fromkeys(sizes, 20e9))
    steps = []
    monkeypatch.setattr(timing, "fastest", lambda step, _: steps.append(step) or 6.0)
    without_launches = dataclasses.replace(plan.CPU, launch=0.0)
    device = step_time.cpu(amp, without_launches)
    (step,) = steps
    step()  # it is a training step that runs
    (name, batch), classes = ("swin_tiny_patch4_window7_224", 2), 1000
    swin = dataclasses.replace(made(name, batch, 224, amp=amp, ema_decay=None), optimizer=NO_CLIPPING)
    cost = count(swin, batch, classes=classes, foreach=False)
    assert step_time.estimate(cost, device, without_launches, serial=True).seconds == pytest.approx(6.0)


def estimated_over_taken(names: dict[str, int]) -> list[float]:
    """Return the estimate of a training step of each model and batch over the time that it takes: 224 pixels, float32,
    one thread, in CPU time, so that other processes matter only where they share memory.
    """
    steps, costs = [], []
    for name, batch in names.items():
        costs.append(counted(name, batch, 224, foreach=False))
        model = timm.create_model(name, num_classes=1000).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
        images, targets = torch.randn(batch, 3, 224, 224), torch.rand(batch, 1000).softmax(1)

        def step(model=model, optimizer=optimizer, images=images, targets=targets):
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        step()  # compiles the fused ops
        steps.append(step)
    ratios = []
    for _ in range(5):  # rates and steps in turns, for a shared machine changes its speed
        device = step_time.cpu("none", plan.CPU)
        found = [step_time.estimate(cost, device, plan.CPU, serial=True).seconds for cost in costs]
        ratios.append([each / timing.fastest(step, 1.0) for each, step in zip(found, steps, strict=True)])
    return [statistics.median(each) for each in zip(*ratios, strict=True)]


@pytest.mark.long
def test_a_cpu_takes_the_estimated_time(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", time.thread_time)
    for ratio in estimated_over_taken({"vig_t": 4, "vmamba_tiny": 2, "deit_tiny_patch16_224": 4}):
        assert ratio == pytest.approx(1.0, rel=0.15)


def started(torchrun: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return what torchrun and visionmix train read from a command line."""
    launcher = torch.distributed.run.get_args_parser().parse_args(torchrun)
    assert (launcher.no_python, launcher.training_script) == (True, "visionmix")
    assert launcher.training_script_args[0] == "train"
    return launcher, train.parser().parse_args(launcher.training_script_args[1:])


def test_the_slurm_script_starts_torchrun_on_each_node(tmp_path):
    assert subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sbatch")]).returncode == 0
    for name, text in (("scontrol", 'printf "node7\nnode8\n"'), ("srun", 'printf "%s\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12",
                   "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip
    command = ["bash", str(CLUSTER / "slurm.sbatch")]
    arguments = ["imagenet/vig_b.yaml", "--data", "/data/a b", "--batch-size", "16"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
    program, *torchrun = done.stdout.splitlines()
    assert program == "torchrun"
    launcher, given = started(torchrun)
    assert (launcher.nnodes, launcher.nproc_per_node, launcher.rdzv_endpoint) == ("2", "4", "node7:29500")
    assert (given.recipe, given.data, given.batch_size, given.resume) == ("imagenet/vig_b.yaml", "/data/a b", 16, "")
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "usage: sbatch" in refused.stderr


def test_the_kubeflow_job_starts_torchrun_on_each_node():
    job = yaml.safe_load((CLUSTER / "pytorchjob.yml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(replica["replicas"] for replica in replicas.values())
    told = {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"], "PET_NODE_RANK": "3",
            "MASTER_ADDR": "master", "MASTER_PORT": "23456"}  # fmt: skip
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert (container["name"], container["command"]) == ("pytorch", ["torchrun"])
        launcher, given = started([re.sub(r"\$\((\w+)\)", lambda m: told[m[1]], each) for each in container["args"]])
        assert (launcher.nnodes, launcher.node_rank, launcher.master_addr) == (str(nodes), 3, "master")
        assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert recipe.read(given.recipe).model.name == "vig_b"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert given.data in mounts
        assert str(given.output.parent) in mounts
        assert set(mounts.values()) == {volume["name"] for volume in replica["template"]["spec"]["volumes"]}

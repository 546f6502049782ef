"""What the options of a recipe do to a run: steps, losses, gradients, learning rates."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import CLASSES, CPU, STILL, VIT, batch, begin, go_on, last_of, losses, make, run, steps
from timm.optim import list_optimizers
from torch import nn

from visionmix.tools import checkpoint, data, train
from visionmix.tools.display import Display
from visionmix.tools.evaluation import predict_some
from visionmix.tools.trainer import Stop, Trainer

ROOT = Path(__file__).parents[2]


def refused(words: tuple[str, ...], error=ValueError, **sections) -> None:
    with pytest.raises(error) as caught:
        begin(**sections)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Accumulation


def test_accumulated_batches_make_the_steps_of_one_large_batch(small, tree):
    torch.set_default_dtype(torch.float64)
    try:
        once = run(tree, 5, data={"batch_size": 4})
        twice = run(tree, 5, data={"batch_size": 2}, train={"accumulate": 2})
    finally:
        torch.set_default_dtype(torch.float32)
    assert once.step == twice.step == 20
    assert once.images_a_step == twice.images_a_step == 4
    start = begin(data={"batch_size": 4}).model.state_dict()
    for name, value in once.model.state_dict().items():
        assert value.dtype == torch.float64
        assert (value - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(twice.model.state_dict()[name], value, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(losses(twice), losses(once), rtol=1e-5, atol=0)


def test_accumulation_counts_schedule_average_and_lr_by_steps(small, tree, monkeypatch):
    sections = {"data": {"batch_size": 2}, "optimizer": {"lr_batch": 12}}
    trainer, loader, _ = train.make_run(make(tree, train={"accumulate": 3, "ema_decay": 0.5}, **sections), CLASSES, CPU)
    told = {"optimizer": 0, "ema": [], "schedule": []}

    def count(*args):
        told["optimizer"] += 1

    trainer.optimizer.register_step_post_hook(count)
    monkeypatch.setattr(trainer.ema, "update", lambda model, step: told["ema"].append(step))
    monkeypatch.setattr(trainer.scheduler, "step_update", told["schedule"].append)
    go_on(trainer, loader, 2)
    assert len(loader) == 9
    assert trainer.step == told["optimizer"] == 6
    assert told["ema"] == told["schedule"] == [1, 2, 3, 4, 5, 6]
    assert trainer.scheduler.base_values == [1e-3, 1e-3]  # 6 images a step


def test_a_loss_that_is_not_finite_is_told_by_its_step(small, tree, monkeypatch):
    trainer, loader, _ = train.make_run(make(tree, data={"batch_size": 2}, train={"accumulate": 3}), CLASSES, CPU)
    update, calls = trainer._update, []

    def spoil(batch):
        calls.append(batch)
        return update(batch) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(trainer, "_update", spoil)
    with pytest.raises(FloatingPointError, match="in epoch 1, step 2 of 3"):
        go_on(trainer, loader, 1)


def test_a_set_smaller_than_an_accumulated_step_is_refused(small, tree):
    with pytest.raises(ValueError, match=r"18 images.*data.batch_size=4 x train.accumulate=5.*or train.accumulate"):
        train.make_run(make(tree, train={"accumulate": 5}), CLASSES, CPU)
    with pytest.raises(ValueError, match=r"train.accumulate=0 is out of range"):
        make(tree, train={"accumulate": 0})


# Losses


@pytest.mark.parametrize(("threshold", "summed"), [(None, False), (0.2, False), (None, True)])
@pytest.mark.parametrize("mixed", [False, True])
def test_binary_cross_entropy(small, threshold, summed, mixed):
    options = {"loss": "bce", "bce_target_threshold": threshold, "bce_sum": summed, "label_smoothing": 0.3}
    trainer = begin(train=options, augment={"mixup": 1.0 if mixed else 0.0}, optimizer={"lr": 0.0})
    given = batch()
    targets = 0.7 * nn.functional.one_hot(given.targets, 3) + 0.3 / 3
    images = given.images.clone()
    if mixed:
        with data.Repeatable(5):
            images, targets = trainer.mixup(images, given.targets)
        assert ((targets > 0.15) & (targets < 0.75)).any()
    if threshold is not None:
        targets = (targets > threshold).float()
    p = trainer.model(images).sigmoid()
    each = -(targets * p.log() + (1 - targets) * (1 - p).log())
    wanted = each.sum(1).mean() if summed else each.mean()
    with data.Repeatable(5):
        loss = trainer._update(given)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)


def test_options_of_a_loss_that_is_not_chosen_are_refused():
    for options in ({"bce_target_threshold": 0.2}, {"bce_sum": True}):
        (key,) = options
        with pytest.raises(ValueError, match=f"train.{key}=.* belongs to train.loss=bce"):
            make(None, train=options)
    with pytest.raises(ValueError, match=r"train.bce_target_threshold=1.5 .* between 0 and 1"):
        make(None, train={"loss": "bce", "bce_target_threshold": 1.5})
    with pytest.raises(ValueError, match=r"train.label_smoothing=1.0 leaves train.loss=bce nothing to learn"):
        make(None, train={"loss": "bce", "label_smoothing": 1.0})
    with pytest.raises(ValueError, match=r"train.loss='ce' is not one of cross_entropy, bce"):
        make(None, train={"loss": "ce"})


# Clipping


def clipped(monkeypatch, **optimizer):
    """Return (gradients before clipping, gradients of the step, parameters before it) by name."""
    before, after = {}, {}
    trainer = begin(optimizer=optimizer)
    parameters = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    step = trainer.scaler.step

    def look(optimizer):
        after.update({name: value.grad.clone() for name, value in trainer.model.named_parameters()})
        step(optimizer)

    monkeypatch.setattr(trainer.scaler, "step", look)
    given = batch()
    given.images *= 100
    nn.functional.cross_entropy(trainer.model(given.images), given.targets, label_smoothing=0.1).backward()
    before.update({name: value.grad.clone() for name, value in trainer.model.named_parameters()})
    trainer._update(given)
    return before, after, parameters


def norm(gradients):
    return torch.cat([value.flatten() for value in gradients.values()]).norm()


def test_gradients_are_clipped_by_norm(small, monkeypatch):
    before, after, _ = clipped(monkeypatch, clip_grad=0.01)
    assert norm(before) > 0.02
    torch.testing.assert_close(norm(after), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_gradients_are_clipped_by_value(small, monkeypatch):
    before, after, _ = clipped(monkeypatch, clip_grad=0.01, clip_mode="value")
    assert norm(before) > 0.02
    for name, value in before.items():
        torch.testing.assert_close(after[name], value.clamp(-0.01, 0.01))


def test_gradients_are_clipped_by_the_size_of_their_unit_except_in_the_classifier(small, monkeypatch):
    before, after, parameters = clipped(monkeypatch, clip_grad=0.01, clip_mode="agc")
    rows = {name: value.flatten(1).norm(dim=1) for name, value in before.items() if value.ndim > 1}
    allowed = 0.01 * parameters["conv.weight"].flatten(1).norm(dim=1).clamp(min=1e-3)
    assert (rows["conv.weight"] > allowed).any()
    torch.testing.assert_close(after["conv.weight"].flatten(1).norm(dim=1), rows["conv.weight"].minimum(allowed))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(after[name], before[name])
    assert (rows["head.weight"] > 0.01 * parameters["head.weight"].norm(dim=1)).any()


def test_a_way_of_clipping_without_a_bound_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.clip_mode='agc' .* optimizer.clip_grad"):
        make(None, optimizer={"clip_mode": "agc"})
    with pytest.raises(ValueError, match=r"optimizer.clip_grad=0.0 must be above 0"):
        make(None, optimizer={"clip_grad": 0.0})


# Optimisers


def test_layer_decay_lowers_the_learning_rate_of_early_layers():
    trainer = begin(
        model={"name": "test_vig"}, data={"image_size": 64}, optimizer={"kwargs": {"layer_decay": 0.5}, "lr": 1.0}
    )
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    rates = {names[id(value)]: group["lr_scale"] for group in trainer.optimizer.param_groups
             for value in group["params"]}  # fmt: skip
    depth = len(trainer.model.blocks)
    assert depth > 1
    for name, rate in rates.items():
        if name.startswith("blocks."):
            assert rate == rates["head.fc.weight"] * 0.5 ** (depth - int(name.split(".")[1])), name
    early = [rate for name, rate in rates.items() if not name.startswith(("blocks.", "head.", "norm."))]
    assert early
    assert max(early) < rates["blocks.0.norm1.weight"]
    trainer.scheduler.step_update(2)
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["lr_scale"] * max(g["lr"] for g in trainer.optimizer.param_groups))


def test_resuming_takes_the_layer_decay_of_the_recipe(small):
    old = begin(optimizer={"kwargs": {"layer_decay": 0.5}})
    old._update(batch())
    state = copy.deepcopy(old.state())
    new = begin(optimizer={"kwargs": {"layer_decay": 0.75}})
    wanted = [group["lr_scale"] for group in new.optimizer.param_groups]
    assert wanted != [group["lr_scale"] for group in old.optimizer.param_groups]
    new.load_state(state, "old")
    assert [group["lr_scale"] for group in new.optimizer.param_groups] == wanted


def stepped(name):
    """Let the optimiser called `name` make two steps; return what was refused, or None."""
    try:
        trainer = begin(optimizer={"name": name, "lr": 0.1}, schedule={"warmup_epochs": 0})
    except ValueError as error:
        return str(error)
    before = trainer.model.conv.weight.clone()
    for seed in range(2):  # some warm up in their first step
        trainer._update(batch(seed=seed))
    assert trainer.model.conv.weight.isfinite().all(), name
    assert not torch.equal(trainer.model.conv.weight, before), name
    return None


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion", "adahessian"])
def test_other_optimisers_step(small, name):
    assert stepped(name) is None


def test_an_optimiser_whose_library_is_missing_is_refused_by_name(small):
    assert "optimizer.name='fusedadam' cannot be used: " in stepped("fusedadam")


@pytest.mark.long
def test_every_optimiser_of_timm_steps_or_is_refused_by_name(small):
    refusals = {name: stepped(name) for name in list_optimizers()}
    refusals = {name: words for name, words in refusals.items() if words}
    assert all(name.startswith(("bnb", "fused")) for name in refusals)
    assert all(f"optimizer.name={name!r} cannot be used: " in words for name, words in refusals.items())


def test_weight_decay_is_the_recipes_and_spares_biases_and_norms(small):
    for decay in (0.0, 0.3):
        trainer = begin(optimizer={"weight_decay": decay, "lr": 0.1, "name": "adamw"}, schedule={"warmup_epochs": 0})
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        for value in trainer.model.parameters():
            value.grad = torch.zeros_like(value)
        trainer._step()
        for name, value in trainer.model.named_parameters():
            kept = 1 - 0.1 * decay if name in ("conv.weight", "head.weight") else 1.0
            torch.testing.assert_close(value, kept * before[name], msg=name)


# Seed, batches and processes that load


def test_the_seed_determines_weights_order_and_augmentation(small, tree):
    seen = []
    for seed in (0, 0, 7):
        trainer, loader, _ = train.make_run(
            make(tree, train={"seed": seed}, augment={"hflip": 0.5, "scale": [0.2, 1.0]}), CLASSES, CPU
        )
        augmented = loader.dataset[(0, 5)].image
        seen.append((trainer.model.conv.weight.clone(), [key.index for key in loader.sampler], augmented))
    first, again, other = seen
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert torch.equal(first[2], again[2])
    assert not torch.equal(first[0], other[0])
    assert first[1] != other[1]
    assert not torch.equal(first[2], other[2])


def test_workers_and_batch_size_are_those_of_the_loaders(small, tree):
    for workers in (0, 2):
        _, *loaders = train.make_run(make(tree, data={"workers": workers, "batch_size": 6}), CLASSES, CPU)
        assert [loader.num_workers for loader in loaders] == [workers] * 2
        assert [len(next(iter(loader)).targets) for loader in loaders] == [6, 6]


# Layout, type and compilation


@pytest.mark.parametrize(
    ("amp", "computed", "kept"),
    [
        ("none", torch.float32, torch.float32),
        ("float16", torch.float16, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("pure_bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_amp_is_the_type_of_the_passes_and_of_the_weights(small, amp, computed, kept):
    trainer, seen = begin(train={"amp": amp}), set()
    trainer.model.conv.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    loss = trainer._update(batch())
    assert seen == {computed}
    assert {value.dtype for value in trainer.model.parameters()} == {kept}
    assert {value.grad.dtype for value in trainer.model.parameters()} == {kept}
    assert loss.dtype == torch.float32
    assert trainer.scaler.is_enabled() == (amp == "float16")
    torch.testing.assert_close(loss, begin()._update(batch()), rtol=0.02, atol=0)


def compiled_by(monkeypatch, backend):
    """Let torch.compile use this backend; return the options of its calls."""
    options, compile = [], torch.compile

    def call(model, **given):
        options.append(given)
        return compile(model, backend=backend, **given)

    monkeypatch.setattr(torch, "compile", call)
    return options


def test_compiled_steps_have_equal_losses(small, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = compiled_by(monkeypatch, backend)
    plain = begin()
    assert options == []
    trainer = begin(train={"compile": True})
    assert options == [{"dynamic": False}]
    assert steps(trainer) == steps(plain)
    assert len(graphs) == 1
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    assert all(torch.equal(value, plain.model.state_dict()[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.long
def test_steps_of_the_default_compiler_have_equal_losses(small):
    for sections in ({}, {"model": {"name": "test_vig"}}):
        found = steps(begin(train={"compile": True}, **sections))
        assert found == pytest.approx(steps(begin(**sections)), rel=1e-5)


def test_checkpointing_saves_fewer_numbers_for_equal_gradients():
    found, kept = {}, {}
    for on in (False, True):
        trainer = begin(train={"checkpointing": on}, **VIT)
        sizes = []

        def pack(value, sizes=sizes):
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            trainer._update(batch())
        kept[on] = sum(sizes)
        found[on] = {name: value.grad for name, value in trainer.model.named_parameters()}
    assert kept[True] < 0.6 * kept[False]
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, msg=name)


def test_checkpointing_of_a_model_that_has_none_is_refused(small):
    refused(("train.checkpointing=True", "'small'"), train={"checkpointing": True})


def test_channels_last_reaches_weights_and_images(small):
    plain, trainer = begin(), begin(train={"channels_last": True})
    seen = []
    trainer.model.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert steps(trainer) == pytest.approx(steps(plain), rel=1e-5)
    for value in (trainer.model.conv.weight, *seen):
        assert value.is_contiguous(memory_format=torch.channels_last)
        assert not value.is_contiguous()
    assert plain.model.conv.weight.is_contiguous()


def test_batch_norms_are_synchronised(small):
    sections = {"model": {"kwargs": {"batch_norm": True}}}
    plain, trainer = begin(**sections), begin(train={"sync_bn": True, "ema_decay": 0.9}, **sections)
    assert type(plain.model.bn) is nn.BatchNorm2d
    assert type(trainer.model.bn) is type(trainer.ema.module.bn) is nn.SyncBatchNorm
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    assert steps(trainer) == steps(plain)


def test_synchronised_batch_norms_of_cpu_processes_are_refused():
    with pytest.raises(ValueError, match=r"train.sync_bn=True needs GPUs, and 2 processes run on the CPU"):
        Trainer(make(None, train={"sync_bn": True}), CLASSES, 4, CPU, 0, 2)


def test_pure_bfloat16_keeps_weights_and_states_in_bfloat16_and_the_average_in_float32(small, tree):
    trainer, loader, tests = train.make_run(
        make(tree, train={"amp": "pure_bfloat16", "ema_decay": 0.9}, augment={"mixup": 0.5}), CLASSES, CPU
    )
    go_on(trainer, loader, 1)
    assert {value.dtype for value in trainer.model.parameters()} == {torch.bfloat16}
    states = [value for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert {value.dtype for value in states} == {torch.bfloat16}
    assert {value.dtype for value in trainer.ema.module.parameters()} == {torch.float32}
    weights = begin().model.conv.weight
    moved = trainer.ema.module.conv.weight - weights.bfloat16()
    assert moved.abs().max() > 1e-4
    assert not torch.equal(trainer.ema.module.conv.weight, trainer.ema.module.conv.weight.bfloat16().float())
    assert trainer.test(tests, Display(1, 1, quiet=True), Stop()).count == 9
    trainer.ema = None
    assert trainer.test(tests, Display(1, 1, quiet=True), Stop()).count == 9
    assert len(predict_some(trainer.tested, tests.dataset, CLASSES, CPU, trainer.recipe.train.amp, 0, 3)[0]) == 3


# Several processes


def test_processes_add_up_their_gradients_once_a_step(small, monkeypatch):
    trainer, passes = begin(train={"accumulate": 3}), []

    class Parallel:
        """Counts the forward passes inside and outside of no_sync, as DistributedDataParallel has it."""

        quiet = False

        @contextmanager
        def no_sync(self):
            self.quiet = True
            yield
            self.quiet = False

        def __call__(self, images):
            passes.append("quiet" if self.quiet else "added up")
            return trainer.student(images)

    trainer.world, trainer.running = 2, Parallel()
    steps(trainer, 6)
    assert passes == ["quiet", "quiet", "added up"] * 2
    assert trainer.step == 2


@pytest.mark.long
def test_two_processes_accumulate_as_one_takes_the_whole_batch(tree, tmp_path):
    settings = {**STILL, **VIT, "optimizer": {"name": "sgd", "lr": 0.1, "lr_batch": None, "clip_grad": 1.0}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    results = []
    for processes, size, accumulate in (("1", 8, 1), ("2", 2, 2)):
        more = ["--set", f"data.batch_size={size}", "--set", f"train.accumulate={accumulate}", "--epochs", "2"]
        where = ["--data", str(tree), "--output", str(tmp_path / processes), "--device", "cpu"]
        script = [str(ROOT / "tools" / "train.py"), str(tmp_path / "r.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [*command, processes, *script, *where, *more], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results.append(checkpoint.read(last_of(tmp_path / processes)))
    one, two = results
    assert one["step"] == two["step"] == 4
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert [row["train_loss"] for row in two["history"]] == pytest.approx([row["train_loss"] for row in one["history"]])

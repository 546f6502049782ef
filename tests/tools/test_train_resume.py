"""A run that is resumed ends in the numbers of the uninterrupted one, whatever the recipe sets."""

import functools

import pytest
import timm.scheduler
import torch
from small_runs import CLASSES, CPU, begin, go_on, losses, make, run, save

from visionmix.tools import checkpoint, train
from visionmix.tools.display import Display
from visionmix.tools.stopping import Interrupted, Stop

NOISY = {
    "scale": [0.5, 1.0],
    "hflip": 0.5,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "erase_prob": 0.5,
}


def vit(name="vit_tiny_patch16_224"):
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "proj_drop_rate": 0.1}
    return {"name": name, "kwargs": kwargs}


RUNS = {
    "accumulation": {
        "model": vit(),
        "augment": NOISY | {"mixup": 0.8, "cutmix": 1.0, "repeats": 3},
        "data": {"batch_size": 2},
        "optimizer": {"clip_grad": 0.1, "clip_mode": "agc", "kwargs": {"layer_decay": 0.7}},
        "schedule": {"name": "multistep", "kwargs": {"decay_milestones": [2], "noise": 0.2}},
        "train": {
            "accumulate": 2, "loss": "bce", "ema_decay": 0.9, "mesa": 1.0, "checkpointing": True, "channels_last": True,
        },
    },
    "pure_bfloat16": {
        "augment": NOISY,
        "train": {"amp": "pure_bfloat16", "ema_decay": 0.9},
        "optimizer": {"name": "lamb"},
    },
    "plateau": {
        "schedule": {"name": "plateau", "kwargs": {"patience_epochs": 0, "decay_rate": 0.5}, "warmup_epochs": 1},
    },
    "views": {"augment": NOISY | {"auto_augment": "augmix-m3-w2", "splits": 2}, "train": {"loss": "jsd"}},
    "batch norms": {"model": {"kwargs": {"batch_norm": True}}, "train": {"sync_bn": True, "accumulate": 2}},
    "reduction": {
        "model": vit() | {"reduction": "dynamicvit:layers=[0]"}, "augment": NOISY, "train": {"ema_decay": 0.9},
    },
    "tokens": {
        "model": vit("deit_tiny_distilled_patch16_224"), "distill": {"kind": "tokens", "hard": True}, "augment": NOISY,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_in_the_same_numbers(small, tree, tmp_path, name):
    if name == "plateau" and not hasattr(timm.scheduler, "WSDLRScheduler"):
        pytest.skip("an older timm")
    sections = RUNS[name]
    if "distill" in sections:
        save(tmp_path / "teacher", begin(model=vit()))
        sections = sections | {"distill": sections["distill"] | {"checkpoint": str(tmp_path / "teacher")}}
    whole = run(tree, 3, **sections)
    half, loader, _ = train.make_run(make(tree, **sections), CLASSES, CPU)
    go_on(half, loader, 2)
    save(tmp_path / "epoch_0002", half)

    def cut_off():
        if half.step == 2 * half.steps + 1:
            save(tmp_path / "epoch_0002_step_00000001", half, loader)
            raise Interrupted

    with pytest.raises(Interrupted):
        half.train_epoch(loader, Display(5, half.steps, quiet=True), Stop(), cut_off)
    for place in ("epoch_0002", "epoch_0002_step_00000001"):
        torch.manual_seed(99)  # a new process starts with other generators
        again, loader, _ = train.make_run(make(tree, **sections), CLASSES, CPU)
        again.load_state(checkpoint.read(tmp_path / place), place)
        assert again.step == 2 * half.steps + (place != "epoch_0002")
        go_on(again, loader, 1)
        compare(again, whole)
    assert len(half.sums.own_losses) == len(whole.own_losses)


def compare(again, whole):
    assert losses(again) == losses(whole)
    assert again.own_losses == whole.own_losses
    assert (again.step, again.epoch) == (whole.step, 3)
    first, second = again.state(), whole.state()
    for part in ("model", "ema"):
        for key, value in (second[part] or {}).items():
            assert torch.equal(first[part][key], value), (part, key)
    for name, state in second["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(first["optimizer"]["state"][name][key]), torch.as_tensor(value)), key
    for ours, theirs in zip(again.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"]


def test_the_rest_of_an_epoch_in_other_steps(small, tree, tmp_path):
    """A checkpoint within an epoch goes on in as many images a step, however they are divided, and in no others."""
    whole = run(tree, 2, data={"batch_size": 4})
    half, loader, _ = train.make_run(make(tree, data={"batch_size": 4}), CLASSES, CPU)
    with pytest.raises(Interrupted):
        half.train_epoch(loader, Display(5, 4, quiet=True), Stop(), lambda: stop_at(half, 3, tmp_path, loader))
    content = checkpoint.read(tmp_path / "epoch_0000_step_00000003")
    again, loader, _ = train.make_run(make(tree, data={"batch_size": 2}, train={"accumulate": 2}), CLASSES, CPU)
    again.load_state(content, "within")
    go_on(again, loader, 2)
    assert again.step == whole.step == 8
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    other, _, _ = train.make_run(make(tree, data={"batch_size": 5}), CLASSES, CPU)
    before = {key: value.clone() for key, value in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"within was written .* after 12 of its images, .* steps of 5 images"):
        other.load_state(content, "within")
    assert all(torch.equal(value, before[key]) for key, value in other.model.state_dict().items())


def stop_at(trainer, step, folder, loader):
    if trainer.step == step:
        save(folder / f"epoch_0000_step_{step:08d}", trainer, loader)
        raise Interrupted


def test_unreadable_images_before_the_checkpoint_are_named_too(small, tree, tmp_path, cut):
    cut(tree / "train" / "red" / "1.jpg")
    for step in range(1, 5):
        half, loader, _ = train.make_run(make(tree), CLASSES, CPU)
        after = functools.partial(stop_at, half, step, tmp_path, loader)
        with pytest.raises(Interrupted):
            half.train_epoch(loader, Display(5, 4, quiet=True), Stop(), after)
        again, loader, _ = train.make_run(make(tree), CLASSES, CPU)
        again.load_state(checkpoint.read(tmp_path / f"epoch_0000_step_{step:08d}"), "within")
        _, unreadable = again.train_epoch(loader, Display(5, 4, quiet=True), Stop())
        assert len(unreadable) == 1
        assert again.step == 4

"""Training image sizes by epoch and by batch."""

import pytest
import torch
from small_runs import CLASSES, CPU, begin, go_on, losses, make, run, save

from visionmix.tools import checkpoint, data, recipe, train
from visionmix.tools.display import Display
from visionmix.tools.trainer import Stop, Trainer

SIZES = [[0, 16], [1, 24, 32, 40], [4, 48]]


def drawn(epoch, rank=0, world=1, seed=3, **options):
    """Return the sizes of an epoch's batches of two images."""
    sampler = data.EpochSampler(48, batch=2, seed=seed, shuffle=True, rank=rank, world=world, sizes=SIZES, **options)
    sampler.set_epoch(epoch)
    sizes = [key.size for key in sampler]
    assert sizes[::2] == sizes[1::2]
    return sizes[::2]


def test_sizes_follow_the_epochs_and_each_batch_draws_one():
    assert [set(drawn(epoch)) for epoch in range(6)] == [{16}, {24, 32, 40}, {24, 32, 40}, {24, 32, 40}, {48}, {48}]
    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1) != drawn(1, seed=4)


def test_all_processes_draw_the_same_sizes():
    assert drawn(1, 0, 3, accumulate=2) == drawn(1, 1, 3, accumulate=2) == drawn(1, 2, 3, accumulate=2)


def test_the_order_of_images_is_that_of_one_size():
    plain = data.EpochSampler(48, batch=2, seed=3, shuffle=True)
    sized = data.EpochSampler(48, batch=2, seed=3, shuffle=True, sizes=SIZES)
    assert [key[:3] for key in sized] == [key[:3] for key in plain]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_the_model_sees_the_sizes_in_training_and_its_own_at_test(small, tree, workers):
    sections = {"data": {"sizes": [[0, 16], [1, 24, 40]], "batch_size": 2, "workers": workers}}
    trainer, loader, tests = train.make_run(make(tree, **sections), CLASSES, CPU)
    seen = []
    trainer.model.conv.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[1:])))
    for _ in range(2):
        go_on(trainer, loader, 1)
        trainer.test(tests, Display(1, 1, quiet=True), Stop())
    assert seen[:9] == [(3, 16, 16)] * 9
    assert set(seen[9:14]) == {(3, 32, 32)}
    assert set(seen[14:23]) == {(3, 24, 24), (3, 40, 40)}
    assert set(seen[23:]) == {(3, 32, 32)}


def test_each_size_is_compiled_once(small, tree, monkeypatch):
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(next(value.shape[-1] for value in inputs if value.shape[:2] == (2, 3)))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=backend, **options))
    sections = {"data": {"sizes": [[0, 16], [1, 24, 40]], "batch_size": 2}}
    plain = run(tree, 3, **sections)
    assert graphs == []
    compiled = run(tree, 3, **sections, train={"compile": True})
    assert sorted(graphs) == [16, 24, 40]
    assert losses(compiled) == losses(plain)


def test_a_resumed_run_sees_the_sizes_of_the_whole(small, tree, tmp_path):
    sections = {"data": {"sizes": SIZES, "batch_size": 2}}
    whole = run(tree, 3, **sections)
    save(tmp_path / "epoch_0002", run(tree, 2, **sections))
    again, loader, _ = train.make_run(make(tree, **sections), CLASSES, CPU)
    again.load_state(checkpoint.read(tmp_path / "epoch_0002"), "epoch_0002")
    go_on(again, loader, 1)
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ([], ValueError, "must begin with epoch 0"),
        ([[1, 32]], ValueError, "must begin with epoch 0"),
        ([[0, 32], [3, 48], [2, 64]], ValueError, "ever later epochs"),
        ([[0, 32], [0, 48]], ValueError, "ever later epochs"),
        ([[0]], ValueError, "first epoch, side"),
        ([[]], ValueError, "first epoch, side"),
        ([[0, 32, 0]], ValueError, "sides above 0"),
        ([[0, 32], [300, 48]], ValueError, "schedule.epochs=300"),
        ([[0, 32.5]], TypeError, "32.5"),
        ([0, 32], TypeError, "data.sizes"),
        (32, TypeError, "data.sizes=32"),
    ],
)
def test_mistakes_are_named(sizes, error, words):
    with pytest.raises(error, match=words) as caught:
        recipe.from_dict({"data": {"sizes": sizes}}, "test")
    assert "data.sizes" in str(caught.value)


def test_sizes_that_model_or_teacher_do_not_take_are_refused(small, tmp_path):
    kwargs = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
    vit = {"name": "vit_tiny_patch16_224", "kwargs": kwargs}
    with pytest.raises(ValueError, match="does not take RGB images of image_size=48"):
        begin(model=vit, data={"sizes": [[0, 32, 48]]})
    save(tmp_path / "teacher", begin(model=vit))
    with pytest.raises(ValueError, match=r"distill.teacher.*does not take RGB images of image_size=48"):
        begin(data={"sizes": [[0, 48]]}, distill={"checkpoint": str(tmp_path / "teacher")})
    assert isinstance(begin(data={"sizes": [[0, 48]]}), Trainer)

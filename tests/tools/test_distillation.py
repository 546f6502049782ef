"""Distillation from a teacher, and from the model's own average: equal to timm's tasks, and it does what it is for."""

import copy

import pytest
import torch
from small_runs import CLASSES, VIT, batch, begin, go_on, make, run, save, steps
from torch import nn
from torch.nn import functional as F

from visionmix.tools import checkpoint, data, recipe, train
from visionmix.tools.trainer import Trainer

TEACHER = {"model": VIT["model"], "train": {"seed": 5}}
DEIT = {
    "model": {
        "name": "deit_tiny_distilled_patch16_224",
        "kwargs": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3},
    }
}


@pytest.fixture
def teacher(tmp_path):
    """A checkpoint of a model with 24 features."""
    path = tmp_path / "teacher"
    save(path, begin(**TEACHER))
    return str(path)


def student(kind, teacher, sections=None, **options):
    sections = sections or (DEIT if kind == "tokens" else {})
    return begin(**sections, distill={"checkpoint": teacher, "kind": kind, **options})


KINDS = [("logits", False), ("features", False), ("tokens", False), ("tokens", True)]


@pytest.mark.parametrize(("kind", "hard"), KINDS)
def test_the_loss_is_that_of_timm(small, teacher, kind, hard):
    task = pytest.importorskip("timm.task", reason="an older timm")
    options = {"weight": 0.7, "task_weight": 0.4, "temperature": 1.0 if kind == "features" else 3.0}
    sections = {"data": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}} | (DEIT if kind == "tokens" else {})
    trainer = student(kind, teacher, sections, hard=hard, **options)
    model = copy.deepcopy(trainer.model).train()
    taught = begin(**TEACHER).model
    model.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    same = {
        "teacher_model": taught.eval(),
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
        "distill_loss_weight": 0.7,
        "task_loss_weight": 0.4,
    }
    if kind == "features":
        theirs = task.FeatureDistillationTask(model, **same)
        theirs.trainable_module.projection.load_state_dict(trainer.student.projection.state_dict())
    elif kind == "tokens":
        theirs = task.TokenDistillationTask(model, **same, temperature=3.0, distill_type="hard" if hard else "soft")
    else:
        theirs = task.LogitDistillationTask(model, **same, temperature=3.0)
    given = batch()
    wanted = theirs(given.images, given.targets)["loss"]
    trainer.student.train()
    torch.testing.assert_close(trainer._update(given), wanted)
    # The weighted distance is logged beside the loss.
    assert 0 < trainer.own_losses["distill"] < wanted


@pytest.mark.parametrize(("kind", "hard"), KINDS)
def test_distillation_brings_the_student_to_the_teacher(small, teacher, kind, hard):
    trainer = student(kind, teacher, None, hard=hard, task_weight=0.0)
    before = copy.deepcopy(trainer.teacher.model.state_dict())
    trainer.student.train()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-2
    trainer.scheduler.step_update = lambda step: None
    given, distances = batch(), []
    for _ in range(25):
        trainer.own_losses = {}
        trainer._update(data.Batch(given.images.clone(), given.targets, [], 0))
        distances.append(trainer.own_losses["distill"].item())
    assert distances[-1] < 0.4 * distances[0]
    assert not trainer.teacher.model.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.model.state_dict().items())


def test_the_projection_of_features_learns_and_is_resumed(small, tree, teacher, tmp_path):
    sections = {"distill": {"checkpoint": teacher, "kind": "features"}}
    whole = run(tree, 2, **sections)
    half = run(tree, 1, **sections)
    save(tmp_path / "epoch_0002", half)
    again, loader, _ = train.make_run(make(tree, **sections), CLASSES, torch.device("cpu"))
    start = again.student.projection.weight.clone()
    again.load_state(checkpoint.read(tmp_path / "epoch_0002"), "epoch_0002")
    go_on(again, loader, 1)
    assert (again.student.projection.weight - start).abs().max() > 1e-4
    assert torch.equal(again.student.projection.weight, whole.student.projection.weight)
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    with pytest.raises(ValueError, match="missing weight"):
        again.load_state(half.state() | {"projection": None}, "epoch_0002")


def test_features_of_equal_width_need_no_projection(small, teacher):
    trainer = student("features", teacher, {"model": {"kwargs": {"width": 24}}})
    assert trainer.student.projection is None
    assert trainer.state()["projection"] is None
    assert trainer._update(batch()).isfinite()


def test_a_teacher_of_other_classes_is_refused_except_for_features(small, tmp_path):
    four = Trainer(make(None, **TEACHER), [*CLASSES, "white"], 4, torch.device("cpu"))
    renamed = Trainer(make(tmp_path, **TEACHER), ["blue", "green", "rouge"], 4, torch.device("cpu"))
    for trainer, words in ((four, "has 4 outputs, and the data 3 classes"), (renamed, "trained on other classes")):
        save(tmp_path / "other", trainer)
        for kind in ("logits", "tokens"):
            with pytest.raises(ValueError, match=f"distill.teacher.*{words}.*distill.kind=features"):
                student(kind, str(tmp_path / "other"))
        assert student("features", str(tmp_path / "other")).teacher


def test_models_and_teachers_that_do_not_fit_are_refused(small, teacher, monkeypatch):
    with pytest.raises(ValueError, match=r"distill.kind='tokens' needs a model with a distillation token.*'small'"):
        student("tokens", teacher, {"data": {}})
    with pytest.raises(ValueError, match=r"distill.teacher='vit_tny.*' is not known"):
        begin(distill={"teacher": "vit_tny_patch16_224"})
    with pytest.raises(ValueError, match=r"distill.teacher=None.*does not take RGB images of image_size=48"):
        begin(data={"image_size": 48}, distill={"checkpoint": teacher})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        begin(distill={"checkpoint": "/nowhere/teacher"})
    own = type(begin().model)
    monkeypatch.setattr(own, "forward_train", lambda self, x: (self(x), {}), raising=False)
    with pytest.raises(ValueError, match=r"distill.kind='features' leaves out the losses that model 'small' has"):
        student("features", teacher)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distill": {"kind": "features"}}, "no effect without distill.teacher or distill.checkpoint"),
        ({"distill": {"kind": "hints"}}, "distill.kind='hints' is not one of logits, features, tokens"),
        ({"distill": {"teacher": "a", "weight": -1.0}}, "distill.weight=-1.0 is out of range"),
        ({"distill": {"teacher": "a", "temperature": 0.0}}, "distill.temperature=0.0 must be above 0"),
        ({"distill": {"teacher": "a", "kind": "features", "hard": True}}, "distill.hard=True"),
        ({"train": {"mesa": 1.0}}, "train.mesa=1.0 needs the moving average; give train.ema_decay"),
        ({"train": {"mesa": -1.0}}, "train.mesa=-1.0 is out of range"),
        ({"train": {"mesa_start": 1.5}}, "train.mesa_start=1.5 is out of range"),
        ({"train": {"mesa_temperature": 0.0}}, "train.mesa_temperature=0.0 must be above 0"),
    ],
)
def test_mistakes_are_named(sections, words):
    with pytest.raises(ValueError, match=words):
        recipe.from_dict(sections, "test")


MESA = {"mesa": 2.0, "mesa_temperature": 3.0, "ema_decay": 0.9, "mesa_start": 0.4}


def test_mesa_adds_the_divergence_from_the_average_from_its_epoch_on(small):
    trainer = begin(train=MESA)
    steps(trainer)
    assert "mesa" not in trainer.own_losses
    trainer.epoch = 2  # of 5
    given = batch()
    logits, averaged = trainer.model(given.images), trainer.ema.module(given.images)
    p, q = (averaged / 3).softmax(1), (logits / 3).softmax(1)
    wanted = 2 * (p * (p / q).log()).sum(1).mean()
    assert wanted > 1e-6
    loss = trainer._update(given)
    plain = F.cross_entropy(logits, given.targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, plain + wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(trainer.own_losses["mesa"], wanted.double(), rtol=1e-3, atol=1e-7)


def test_mesa_has_the_gradient_of_the_published_cross_entropy(small):
    """VSSD and MILA add SoftTargetCrossEntropy(logits, softmax of the average's logits), of temperature 1."""
    trainer = begin(train=MESA | {"mesa_start": 0.0, "mesa_temperature": 1.0})
    steps(trainer)
    given = batch()
    logits, averaged = trainer.model(given.images), trainer.ema.module(given.images).detach()
    loss = F.cross_entropy(logits, given.targets, label_smoothing=0.1) + 2 * F.cross_entropy(
        logits, averaged.softmax(1)
    )
    wanted = torch.autograd.grad(loss, trainer.model.conv.weight)[0]
    trainer._update(given)
    torch.testing.assert_close(trainer.model.conv.weight.grad, wanted, rtol=1e-4, atol=1e-7)

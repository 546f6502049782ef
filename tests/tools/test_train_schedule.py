"""Schedules: the learning rate at every step, when a run ends, and how a run goes on."""

import copy
import math

import pytest
import timm.scheduler
import torch
from torch import nn

from visionmix.tools import recipe, saving, train
from visionmix.tools.display import Display
from visionmix.tools.schedule import make_scheduler
from visionmix.tools.trainer import Stop, Trainer

STEPS = 4
newer = pytest.mark.skipif(not hasattr(timm.scheduler, "WSDLRScheduler"), reason="an older timm")


def settings(**schedule):
    return {"warmup_epochs": 2, "warmup_lr": 0.0, "min_lr": 0.01, "epochs": 12} | schedule


def rates(**schedule) -> list[float]:
    """Return the learning rate of each step, for a peak of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    wanted = recipe.from_dict({"schedule": settings(**schedule)}, "test").schedule
    scheduler = make_scheduler(optimizer, wanted, STEPS, 1.0)
    found = []
    for step in range(wanted.epochs * STEPS):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


WARMUP = [step / 8 for step in range(8)]


def test_cosine_with_cooldown_ends_in_epochs_at_the_least_rate():
    found = rates(cooldown_epochs=3)
    assert found[:8] == pytest.approx(WARMUP)
    cosine = [0.01 + 0.99 / 2 * (1 + math.cos(math.pi * step / 28)) for step in range(28)]
    assert found[8:36] == pytest.approx(cosine)
    assert found[36:] == [0.01] * 12
    assert rates()[36] > 0.01


def test_tanh():
    found = rates(name="tanh")
    wanted = [0.01 + 0.99 / 2 * (1 - math.tanh(-7 + 10 * step / 40)) for step in range(40)]
    assert found == pytest.approx(WARMUP + wanted)


@pytest.mark.parametrize("kwargs", [{}, {"decay_rate": 0.9, "k_decay": 1.5}])
def test_poly_has_its_power(kwargs):
    power, k = kwargs.get("decay_rate", 0.1), kwargs.get("k_decay", 1.0)
    wanted = [0.01 + 0.99 * (1 - (step / 40) ** k) ** power for step in range(40)]
    assert rates(name="poly", kwargs=kwargs) == pytest.approx(WARMUP + wanted)


@newer
def test_warmup_stable_decay():
    found = rates(name="wsd", kwargs={"decay_epochs": 4, "decay_fn": "linear"}, cooldown_epochs=1)
    assert found[:8] == pytest.approx(WARMUP)
    assert found[8:28] == [1.0] * 20
    assert found[28:44] == pytest.approx([1 - 0.99 * step / 16 for step in range(16)])
    assert found[44:] == pytest.approx([0.01] * 4)


@newer
def test_reciprocal_square_root():
    found = rates(name="rsqrt", kwargs={"decay_epochs": 1, "stable_timescale": 1})
    assert found[8:44] == pytest.approx([(1 + step / 4) ** -0.5 for step in range(36)])


@newer
def test_constant():
    assert rates(name="constant") == pytest.approx(WARMUP + [1.0] * 40)


def test_milestones_are_epochs_of_the_run():
    found = rates(name="multistep", kwargs={"decay_milestones": [5, 9], "decay_rate": 0.5})
    changes = [step for step in range(9, 48) if found[step] != found[step - 1]]
    # timm's milestone m of updates applies at update m - 1.
    assert changes == [5 * STEPS - 1, 9 * STEPS - 1]
    assert found[10] == 1.0
    assert found[-1] == 0.25


def test_step_takes_its_interval_and_rate():
    found = rates(name="step", kwargs={"decay_epochs": 4, "decay_rate": 0.5})
    assert found[8:] == [1.0] * 16 + [0.5] * 16 + [0.25] * 8


@pytest.mark.parametrize(("mul", "starts"), [(1.0, [8, 28]), (3.0, [8, 18])])
def test_cycles_fit_in_the_epochs(mul, starts):
    found = rates(kwargs={"cycle_limit": 2, "cycle_mul": mul, "cycle_decay": 0.5})
    assert [found[start] for start in starts] == pytest.approx([1.0, 0.5])
    tops = [step for step in range(9, 47) if found[step - 1] < found[step] > found[step + 1]]
    assert tops == starts[1:]
    assert found[-1] < 0.03


def test_noise_moves_the_rate_within_its_part():
    plain, found = rates(), rates(kwargs={"noise": [0.5, 0.75], "noise_pct": 0.3})
    moved = [step for step in range(48) if found[step] != plain[step]]
    assert moved == list(range(20, 30))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"name": "linear"}, ("schedule.name='linear' is not one of cosine", "wsd")),
        ({"kwargs": {"decay_rate": 0.5}}, ("schedule.kwargs.decay_rate=0.5", "'cosine'", "cycle_limit")),
        ({"name": "step", "kwargs": {"decay_epoch": 3}}, ("did you mean 'decay_epochs'",)),
        ({"kwargs": {"min_lr": 0.5}}, ("schedule.kwargs.min_lr=0.5",)),
        ({"kwargs": {"cycle_limit": 0}}, ("schedule.name='cosine'", "'cycle_limit': 0")),
        ({"kwargs": {"cycle_limit": "two"}}, ("schedule.name='cosine'", "'cycle_limit': 'two'")),
        ({"name": "multistep", "kwargs": {"decay_milestones": [9, 5]}}, ("decay_milestones=[9, 5]", "ascending")),
        (
            {"name": "multistep", "kwargs": {"decay_milestones": [5, "9"]}},
            ("decay_milestones=[5, '9']", "list of epochs"),
        ),
        ({"name": "multistep", "kwargs": {"decay_milestones": 5}}, ("decay_milestones=5", "list of epochs")),
        ({"stop_epoch": 13}, ("schedule.stop_epoch=13", "between 1 and schedule.epochs=12")),
        ({"stop_epoch": 0}, ("schedule.stop_epoch=0",)),
        ({"cooldown_epochs": -1}, ("schedule.cooldown_epochs=-1",)),
        ({"cooldown_epochs": 10}, ("schedule.warmup_epochs=2 and schedule.cooldown_epochs=10 leaves nothing",)),
        ({"cooldown_epochs": 2, "name": "step"}, ("schedule.cooldown_epochs=2", "'step'", "cosine")),
        pytest.param(
            {"name": "wsd", "kwargs": {"decay_epochs": 20}}, ("schedule.name='wsd'", "decay_epochs"), marks=newer
        ),
        pytest.param({"name": "wsd", "kwargs": {"decay_fn": "cube"}}, ("schedule.kwargs", "cube"), marks=newer),
    ],
)
def test_mistakes_are_named(schedule, words):
    with pytest.raises(ValueError, match="schedule") as caught:
        rates(**schedule)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def trainer(**schedule):
    tree = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": {"img_size": 32, "embed_dim": 12, "depth": 1}},
        "data": {"image_size": 32},
        "optimizer": {"lr": 1.0, "lr_batch": None},
        "schedule": settings(**schedule),
    }
    return Trainer(recipe.from_dict(tree, "test"), ["a", "b"], STEPS, torch.device("cpu"))


@newer  # the older one gives torch's scheduler an argument that it no longer takes
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler:FutureWarning")
def test_a_plateau_lowers_the_rate_and_goes_on_where_it_stopped():
    schedule = {"name": "plateau", "kwargs": {"patience_epochs": 1, "decay_rate": 0.5}}
    tops = [10, 20, 30, 30, 30, 30, 30, 40, 40]
    whole, found = trainer(**schedule), []
    for epoch, top in enumerate(tops):
        whole.finish_epoch({"test_top1": top})
        found.append(whole.optimizer.param_groups[0]["lr"])
        if epoch == 5:
            state = copy.deepcopy(whole.state())
    assert found == [0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    again = trainer(**schedule)
    again.load_state(state, "epoch_0002")
    assert again.optimizer.param_groups[0]["lr"] == 0.5
    for epoch, top in enumerate(tops[6:], 6):
        again.finish_epoch({"test_top1": top})
        assert again.optimizer.param_groups[0]["lr"] == found[epoch]


def test_a_run_ends_at_its_stop_epoch_with_the_rates_of_the_whole(tmp_path, monkeypatch):
    stopped = trainer(stop_epoch=3)
    seen = []

    def train_epoch(loader, display, stop, after_step):
        stopped.sums.lr = stopped.lr
        stopped.step += STEPS
        stopped.scheduler.step_update(stopped.step)
        return 1.0, []

    class Result:
        loss, figures, unreadable = 1.0, {"top1": 50.0, "top5": 100.0}, []

    monkeypatch.setattr(stopped, "train_epoch", train_epoch)
    monkeypatch.setattr(stopped, "test", lambda *_: Result)
    saver = saving.Saver(tmp_path, print)
    monkeypatch.setattr(saver, "save", lambda name, content, best: seen.append(content["epoch"]))
    display = Display(3, STEPS, quiet=True)
    monkeypatch.setattr(display, "end_epoch", lambda *_: None)
    train.run_epochs(stopped, None, None, tmp_path, display, Stop(), saver)
    assert max(seen) == stopped.epoch == 3
    assert stopped.history[-1]["lr"] == 1.0
    assert stopped.optimizer.param_groups[0]["lr"] == pytest.approx(rates()[12])

"""How the time of training steps divides: each part against a delay put there, on the CPU and by events of a GPU."""

import csv
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from visionmix.tools import display, loading, stopwatch, train
from visionmix.tools.stopwatch import Stopwatch
from visionmix.tools.trainer import Trainer

CPU = torch.device("cpu")
DELAY = 100.0  # seconds, beside which all that passes in truth is little


@pytest.fixture
def wait(monkeypatch):
    """Return a function that lets seconds pass on the process's clock and takes none."""
    passed, clock = [0.0], time.perf_counter

    def waiting(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    return waiting


def test_laps_add_up_by_part_until_the_next_start(wait):
    watch = Stopwatch(CPU, torch.nn.Identity())
    for _ in range(2):
        for part in ("data", None, "compute"):
            wait(DELAY)
            watch.lap(part)
    totals = watch.totals()
    assert list(totals) == ["data", "compute", "optimizer"]
    assert 2 * DELAY <= totals["data"] < 3 * DELAY
    assert 2 * DELAY <= totals["compute"] < 3 * DELAY
    assert totals["optimizer"] == 0
    watch.start()
    assert set(watch.totals().values()) == {0}


class Event:
    """An event of a GPU, which reaches it three events after it is recorded, or when somebody waits for it."""

    now = passed = 0  # milliseconds

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        Event.passed = max(Event.passed, Event.now - 3)
        self.time = Event.now

    def query(self):
        return self.time <= Event.passed

    def synchronize(self):
        Event.passed = max(Event.passed, self.time)

    def elapsed_time(self, other):
        assert self.query()
        assert other.query()
        return other.time - self.time


def test_on_a_gpu_events_are_added_up_as_the_gpu_passes_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(CPU, torch.nn.Identity())
    watch.device = torch.device("cuda")
    watch.start()
    for _ in range(20):
        for part in ("data", "compute", "optimizer", None):
            watch.lap(part)
            assert len(watch.marks) <= 5
    watch.device = CPU  # where totals makes its tensor
    assert watch.totals() == pytest.approx({"data": 0.02, "compute": 0.02, "optimizer": 0.02})


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_communication_is_the_wait_after_the_last_gradient(one_process, wait, monkeypatch):
    class Slow(torch.autograd.Function):
        """Takes its time in the backward pass."""

        @staticmethod
        def forward(context, images):
            return images.clone()

        @staticmethod
        def backward(context, gradient):
            wait(2 * DELAY)
            return gradient

    class Model(torch.nn.Sequential):
        def forward(self, images):
            return Slow.apply(super().forward(images))

    average = stopwatch.allreduce_hook

    def slow(state, bucket):
        wait(4 * DELAY)
        return average(state, bucket)

    monkeypatch.setattr(stopwatch, "allreduce_hook", slow)
    torch.manual_seed(0)
    model = Model(torch.nn.Linear(4, 4))
    running = DistributedDataParallel(model)
    watch = Stopwatch(CPU, running)
    images = torch.randn(3, 4)
    running(images).square().sum().backward()
    watch.lap("compute")
    watch.lap("optimizer")
    totals = watch.totals()
    assert list(totals) == ["data", "compute", "communication", "optimizer"]
    assert 2 * DELAY <= totals["compute"] < 4 * DELAY <= totals["communication"] < 6 * DELAY
    assert totals["optimizer"] < DELAY
    gradient = model[0].weight.grad.clone()
    watch.start()
    with running.no_sync():  # as batches do that a step gathers
        running(images).square().sum().backward()
        watch.lap("compute")
    assert watch.totals()["communication"] == 0
    torch.testing.assert_close(model[0].weight.grad, 2 * gradient)


def test_communication_that_cannot_be_separated_is_said_to_be_in_the_passes():
    watch = Stopwatch(CPU, torch.nn.Identity(), world=2)
    watch.lap("compute")
    assert list(watch.totals()) == ["data", "compute_and_communication", "optimizer"]
    assert watch.totals()["compute_and_communication"] > 0


ROW = {"epoch": 1, "train_loss": 1.0, "test_loss": 1.0, "test_top1": 50.0, "lr": 1e-3, "images_per_second": 9.0}


def test_the_display_says_how_the_time_divides(capsys):
    seconds = {"data": 1.0, "compute_and_communication": 6.0, "optimizer": 1.0}
    shown = display.Display(1, 1)
    shown.begin(1, "train", 1)
    shown.end_epoch(ROW | {"seconds": 8.0} | {f"seconds_{part}": value for part, value in seconds.items()}, False)
    line = capsys.readouterr().out.splitlines()[-1].strip()
    assert line == "waiting for data 12 %, forward, backward and communication 75 %, optimiser 12 %"


@pytest.mark.parametrize("slow", ["data", "compute", "optimizer"])
def test_a_slow_part_of_a_run_shows_as_that_part(slow, recipe_file, tree, tmp_path, wait, monkeypatch, capsys):
    def delayed(act):
        def acting(*args):
            wait(DELAY)
            return act(*args)

        return acting

    owner, name = {"data": (loading, "collate"), "compute": (Trainer, "_loss"), "optimizer": (Trainer, "_step")}[slow]
    monkeypatch.setattr(owner, name, delayed(getattr(owner, name)))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    files = [str(recipe_file), "--data", str(tree), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert train.main([*files, "--epochs", "2"]) == 0
    with (tmp_path / "out" / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            seconds = {part: float(row[f"seconds_{part}"]) for part in ("data", "compute", "optimizer")}
            assert seconds[slow] >= 4 * DELAY  # four steps an epoch
            assert sum(seconds.values()) - seconds[slow] < DELAY
            assert sum(seconds.values()) < float(row["seconds"])
    assert capsys.readouterr().out.count("waiting for data") == 2

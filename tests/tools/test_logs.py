"""TensorBoard and Weights & Biases: what a run leaves there, and that their failures end no training."""

import errno
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from small_runs import last_of
from tensorboard.summary.writer import event_file_writer

from visionmix.tools import checkpoint, logs, pictures, recipe, train
from visionmix.tools.logs import Logs
from visionmix.tools.recipe_keys import Recipe

ROOT = Path(__file__).parents[2]

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    """Return what TensorBoard shows of a run."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def values(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_leaves_figures_pictures_and_recipe_for_tensorboard(whole_run):
    events = read(whole_run[0])
    content = checkpoint.read(last_of(whole_run[0]))
    steps = values(events, "step/loss")
    assert [step for step, _ in steps] == list(range(1, 13))
    assert values(events, "step/lr")
    for name, value in content["history"][0].items():
        shown = values(events, f"epoch/{name}")
        assert [step for step, _ in shown] == [4, 8, 12]
        assert shown[0][1] == pytest.approx(value)
    for epoch, row in enumerate(content["history"]):
        losses = [loss for step, loss in steps[4 * epoch : 4 * epoch + 4]]
        assert np.mean(losses) == pytest.approx(row["train_loss"])
    for name in ("curves", "confusion", "predictions"):
        (shown,) = events.Images(name)
        with Image.open(whole_run[0] / f"{name}.png") as image:
            assert (shown.width, shown.height) == image.size
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    written = yaml.safe_load(text.removeprefix("```yaml\n").removesuffix("```"))
    assert recipe.from_dict(written, "TensorBoard") == recipe.from_dict(content["recipe"], "checkpoint")


def test_steps_that_a_stop_undid_are_shown_once(tmp_path, monkeypatch):
    # Files are read in the order of their names, in which the tenth of a second comes before its ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for step, loss, last in ((0, 1.0, 5), (3, 2.0, 6)):  # the second goes on from step 3
        with Logs(tmp_path, Recipe(), step=step) as made:
            for number in range(step + 1, last + 1):
                made.step(number, {"loss": loss})
    assert values(read(tmp_path), "step/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    with Logs(tmp_path, Recipe()) as made:  # a run that overwrites it
        made.step(1, {"loss": 3.0})
    assert values(read(tmp_path), "step/loss") == [(1, 3.0)]


def test_a_process_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Logs(None, Recipe()) as made:
        made.step(1, {"loss": 1.0})
        made.epoch(1, {"epoch": 1})
        made.pictures(1, {"curves": tmp_path / "none.png"})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_warns_once(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's own thread shows the error too
    said = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Logs(tmp_path, Recipe(), note=lambda *words: said.append(words)) as made:
        made.epoch(1, {"epoch": 1})
        (size,) = (file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # what is written beyond it fails
            for step in range(2, 200):
                made.step(step, {"loss": 1.0})
                made.epoch(step, {"epoch": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ((text, style),) = said
    assert "TensorBoard failed" in text
    assert "File too large" in text
    assert style == "yellow"


def fails(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "when",
    ["__init__", "scalars", *(pytest.param(name, marks=pytest.mark.long) for name in ("flush", "pictures", "close"))],
)
def test_a_writer_that_fails_ends_no_training(when, recipe_file, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs._TensorBoard, when, fails)
    monkeypatch.setattr(pictures, "draw_predictions", lambda *_: None)
    monkeypatch.setattr(pictures, "draw_confusion", fails)
    files = [str(recipe_file), "--data", str(tree), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert train.main([*files, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("TensorBoard failed ([Errno 28] No space left on device); the training goes on without it") == 1
    assert checkpoint.read(last_of(tmp_path / "out"))["epoch"] == 2
    assert "2 epochs in" in out  # its end is reached, without the picture that the disk refused
    assert "curves.png" in out
    assert "confusion.png" not in out


class Wandb(ModuleType):
    """What of the package `wandb` a run calls, and what it was called with."""

    def __init__(self):
        super().__init__("wandb")
        self.Settings, self.Image = dict, lambda file: f"image {file}"
        self.calls, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.calls.append(options)
        self.id = options["id"] or f"run{len(self.calls)}"
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stub = Wandb()
    stub.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_a_run_goes_to_its_project_of_weights_and_biases(wandb, recipe_file, tree, tmp_path):
    output = tmp_path / "out"
    files = [str(recipe_file), "--data", str(tree), "--output", str(output), "--device", "cpu"]
    files += ["--set", "log.wandb=flowers"]
    assert train.main([*files, "--set", "schedule.stop_epoch=1"]) == 0
    (first,) = wandb.calls
    assert (first["project"], first["name"], first["id"], first["dir"]) == ("flowers", "out", None, output)
    assert first["config"]["optimizer"]["lr"] == 2e-3
    rows = {name: (step, value) for step, figures in wandb.logged for name, value in figures.items()}
    assert rows["epoch/epoch"] == (4, 1)
    assert rows["step/loss"][0] == 4
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps)
    assert wandb.finished == 1
    assert train.main([*files, "--resume"]) == 0
    assert (wandb.calls[1]["id"], wandb.calls[1]["resume"]) == ("run1", "allow")
    assert wandb.logged[-1][0] == 12
    assert train.main([*files, "--overwrite", "--epochs", "2"]) == 0
    assert wandb.calls[2]["id"] is None


def test_pictures_go_to_weights_and_biases(wandb, tmp_path):
    made = Recipe()
    made.log.wandb = "flowers"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with Logs(tmp_path, made) as given:
        given.pictures(7, {"curves": tmp_path / "a.png"})
    assert wandb.logged == [(7, {"curves": f"image {tmp_path / 'a.png'}"})]
    assert len(read(tmp_path).Images("curves")) == 1


def test_an_unreachable_server_warns_and_leaves_tensorboard(wandb, tmp_path, monkeypatch):
    def unreachable(**_):
        raise TimeoutError("no answer from the server in 60 s")

    wandb.init = unreachable
    made, said = Recipe(), []
    with Logs(tmp_path / "unasked", made, note=said.append):
        assert not said
    made.log.wandb = "flowers"
    with Logs(tmp_path, made, note=lambda *words: said.append(words[0])) as given:
        given.step(1, {"loss": 1.0})
    assert said == ["Weights & Biases failed (no answer from the server in 60 s); the training goes on without it"]
    assert values(read(tmp_path), "step/loss") == [(1, 1.0)]


def test_a_project_without_the_package_is_refused(recipe_file, tree, monkeypatch, capsys):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    assert train.main([str(recipe_file), "--data", str(tree), "--set", "log.wandb=flowers"]) == 2
    assert "log.wandb='flowers' needs the package wandb; install it" in capsys.readouterr().err


@pytest.mark.long  # starts the package's own process
def test_the_package_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    made, said = Recipe(), []
    made.log.wandb = "flowers"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for step in (0, 3):
        with Logs(tmp_path, made, step=step, note=lambda *words: said.append(words)) as given:
            given.step(step + 1, {"loss": 1.0})
            given.epoch(step + 3, {"epoch": 1})
            given.pictures(step + 3, {"curves": tmp_path / "a.png"})
    assert not said
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(run.name.endswith((tmp_path / "wandb" / "run_id").read_text()) for run in runs)


@pytest.mark.long  # two processes that import PyTorch
def test_of_two_processes_the_first_writes_and_says_how_the_time_of_both_divides(recipe_file, tree, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [str(recipe_file), "--data", str(tree), "--output", str(tmp_path / "out"), "--device", "cpu"]
    more = ["--epochs", "2", "--set", "data.batch_size=2"]
    done = subprocess.run(
        [*command, str(ROOT / "tools" / "train.py"), *given, *more], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    assert len(values(read(tmp_path / "out"), "epoch/seconds_communication")) == 2
    lines = [line.strip() for line in done.stdout.splitlines() if "waiting for data" in line]
    assert len(lines) == 2
    shares = [int(share) for share in re.findall(r"(\d+) %", lines[-1])]
    assert len(shares) == 4
    assert 97 <= sum(shares) <= 103
    assert re.search(r"communication [1-9]", lines[-1])

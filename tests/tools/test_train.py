"""Trainer runs from end to end: results, stopping and going on, failures on the way."""

import copy
import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import best_of, last_of

from visionmix.tools import checkpoint, models, recipe, train, validate
from visionmix.tools.trainer import Trainer

ROOT = Path(__file__).parents[2]
METRICS = ("epoch", "train_loss", "test_loss", "test_top1", "test_top5", "lr", "unreadable")


def read(folder):
    return checkpoint.read(last_of(folder))


def run(recipe_file, tree, output, *more):
    return train.main([str(recipe_file), "--data", str(tree), "--output", str(output), "--device", "cpu", *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_step(monkeypatch, step, act):
    """Call `act` in the middle of the training step numbered `step`, counted over the whole run."""
    update = Trainer._update

    def acting(self, batch):
        if self.step + 1 == step:
            act(self)
        return update(self, batch)

    monkeypatch.setattr(Trainer, "_update", acting)


def same(first: Path, second: Path) -> None:
    """The last checkpoints of two runs agree in every number, times aside."""
    a, b = read(first), read(second)
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert [[row[key] for key in METRICS] for row in a["history"]] == [
        [row[key] for key in METRICS] for row in b["history"]
    ]
    for name, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][name][key]) for key, value in state.items())


def test_a_run_leaves_all_its_files(whole_run):
    finished, printed = whole_run
    with (finished / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    content = read(finished)
    assert content["classes"] == ["blue", "green", "red"]
    assert float(rows[-1]["test_top1"]) == content["history"][-1]["test_top1"]
    assert (content["epoch"], content["step"]) == (3, 12)
    best = checkpoint.read(best_of(finished))
    assert best["history"][-1]["test_top1"] == max(float(row["test_top1"]) for row in rows)
    tensors = checkpoint.read(finished / "best.safetensors")
    assert tensors["classes"] == content["classes"]
    assert all(torch.equal(best["ema"][key], value) for key, value in tensors["model"].items())
    for name in ("curves", "confusion", "predictions"):
        with Image.open(finished / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 100
    assert not [path.name for path in finished.iterdir() if path.name.startswith(".")]
    assert "test top-1" in printed
    assert str(finished / "predictions.png") in printed


@pytest.mark.parametrize(
    ("workers", "every", "saved"),
    [
        pytest.param("0", "0", "epoch_0002", marks=pytest.mark.long),
        pytest.param("2", "0", "epoch_0002", marks=pytest.mark.long),
        pytest.param("0", "3", "epoch_0002_step_00000009", marks=pytest.mark.long),
        ("2", "3", "epoch_0002_step_00000009"),
    ],
)
def test_resume_after_ctrl_c_ends_in_the_same_numbers(
    recipe_file, tree, tmp_path, finished, monkeypatch, capsys, workers, every, saved
):
    halted = tmp_path / "halted"
    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        at_step(patch, 11, lambda self: os.kill(os.getpid(), signal.SIGINT))
        more = ("--workers", workers, "--set", f"train.save_steps={every}")
        assert run(recipe_file, tree, halted, *more) == 130
    out = capsys.readouterr().out
    assert f"{saved} is saved" in out
    assert f"--resume {halted}\n" in out
    assert last_of(halted).name == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(99)  # a new process starts with other generators
    assert train.main(["--resume", str(halted), "--device", "cpu"]) == 0
    same(finished, halted)


def test_a_second_ctrl_c_aborts(recipe_file, tree, tmp_path, monkeypatch):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 6, twice)
    with pytest.raises(KeyboardInterrupt):
        run(recipe_file, tree, tmp_path / "out")
    deadline = time.monotonic() + 20
    while last_of(tmp_path / "out") is None and time.monotonic() < deadline:  # written while the training goes on
        time.sleep(0.01)
    assert read(tmp_path / "out")["epoch"] == 1


def test_ctrl_c_before_the_first_epoch_says_that_nothing_is_saved(recipe_file, tree, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda self: os.kill(os.getpid(), signal.SIGINT))
    assert run(recipe_file, tree, tmp_path / "out") == 130
    assert "nothing is saved" in capsys.readouterr().out


def test_minutes_between_checkpoints_are_those_of_the_recipe(recipe_file, tree, tmp_path, monkeypatch):
    for minutes, saved in (("1e-9", "epoch_0000_step_00000002"), ("1000", None)):
        with monkeypatch.context() as patch:
            at_step(patch, 3, lambda self: os.kill(os.getpid(), signal.SIGINT))
            # The step that is under way when the signal comes is finished, and saved as each one before.
            assert run(recipe_file, tree, tmp_path / minutes, "--set", f"train.save_minutes={minutes}") == 130
        found = last_of(tmp_path / minutes)
        assert (found and found.name >= saved) if saved else found is None


def test_a_finished_run_is_not_overwritten_by_mistake(finished, recipe_file, tree, capsys):
    before = contents(finished / "checkpoints")
    assert run(recipe_file, tree, finished) == 2
    assert "--resume goes on with it, --overwrite starts again" in capsys.readouterr().err
    assert run(recipe_file, tree, finished, "--resume") == 0  # nothing left to train: tested and drawn again
    assert contents(finished / "checkpoints") == before
    assert run(recipe_file, tree, finished, "--overwrite", "--epochs", "2") == 0
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["epoch_0001", "epoch_0002"]
    assert read(finished)["epoch"] == 2


def test_resume_with_another_learning_rate_says_so_and_uses_it(finished, recipe_file, tree, capsys):
    more = ("--resume", str(last_of(finished)), "--epochs", "4", "--lr", "1e-4", "--set", "schedule.min_lr=1e-4")
    assert run(recipe_file, tree, finished, *more) == 0
    assert "changed: optimizer.lr=0.0001 (was 0.002)" in capsys.readouterr().out
    assert read(finished)["history"][-1]["lr"] == pytest.approx(1e-4)


def test_resume_takes_options_of_the_optimiser_and_no_other_optimiser(finished, recipe_file, tree, capsys):
    more = ("--resume", str(last_of(finished)), "--epochs", "4", "--set")
    assert run(recipe_file, tree, finished, *more, "optimizer.kwargs={betas: [0.5, 0.6], eps: 0.01}") == 0
    assert "changed: optimizer.kwargs" in capsys.readouterr().out
    groups = read(finished)["optimizer"]["param_groups"]
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.5, 0.6, 0.01)}
    for name in ("sgd", "lion"):
        assert run(recipe_file, tree, finished, "--resume", "--epochs", "5", "--set", f"optimizer.name={name}") == 2
        assert f"optimizer.name={name!r} cannot go on from" in capsys.readouterr().err


def test_the_output_is_no_file(recipe_file, tree, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("precious")
    assert train.main([str(recipe_file), "--data", str(tree), "--output", str(tmp_path / "notes.txt")]) == 2
    assert "notes.txt, which is a file; give another place" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(recipe_file, tree, tmp_path, monkeypatch, capsys):
    def spoil(self):
        next(self.model.parameters()).data.fill_(float("nan"))

    at_step(monkeypatch, 7, spoil)
    assert run(recipe_file, tree, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "the loss is nan in epoch 2, step 3 of 4" in err
    assert f"--resume {tmp_path / 'out'} --lr 0.001" in err
    assert all(value.isfinite().all() for value in read(tmp_path / "out")["model"].values())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_images_are_counted_and_named(recipe_file, tree, tmp_path, cut, capsys, workers):
    broken = tree / "train" / "red" / "1.jpg", tree / "val" / "green" / "0.jpg"
    for path in broken:
        cut(path)
    assert run(recipe_file, tree, tmp_path / "out", "--workers", workers, "--batch-size", "6") == 0
    rows = read(tmp_path / "out")["history"]
    assert [row["unreadable"] for row in rows] == [2, 2, 2]
    out = capsys.readouterr().out
    assert all(out.count(str(path)) == 3 for path in broken)
    assert "of 8 images" in out


def test_an_all_broken_training_set_is_an_error(recipe_file, tree, tmp_path, cut, capsys):
    for path in (tree / "train").rglob("*.jpg"):
        cut(path)
    assert run(recipe_file, tree, tmp_path / "out") == 1
    assert "20 training images drawn one after another cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "vig_zz"), ("model='vig_zz' is not known (did you mean 'vig_",)),
        (("--set", "model.kwargs.depht=3"), ("does not take these arguments", "depht")),
        (("--img-size", "48"), ("does not take RGB images of image_size=48", "model.kwargs.img_size=48")),
        (("--set", "optimizer.name=adamww"), ("optimizer.name='adamww'",)),
        (("--set", "optimizer.kwargs.beta=3"), ("does not take kwargs", "beta")),
        (("--set", "optimizer.kwargs.betas=[2, 3]"), ("does not take kwargs", "betas")),
        (("--set", "optimizer.kwargs.momentum=0.5"), ("does not take kwargs", "momentum")),
        (("--set", "optimizer.kwargs.layer_decay=7"), ("optimizer.kwargs.layer_decay=7 multiplies",)),
        (
            ("--set", "train.ema_warmup=true", "--set", "train.ema_decay=null"),
            ("train.ema_warmup=True needs the moving average",),
        ),
        (("--set", "model.kwargs.num_classes=3"), ("model.kwargs.num_classes=3 is what the data decide",)),
        (("--set", "schedule.name=multistep"), ("needs schedule.kwargs.decay_milestones",)),
        (("--lr", "5", "--set", "optimizer.lr=1e-3"), ("--set optimizer.lr=1e-3", "gives optimizer.lr=5.0")),
        (("--device", "meta"), ("--device 'meta' cannot be used",)),
        (("--batch-size", "64"), ("has 18 images", "lower data.batch_size")),
        (("--set", "optimizer.learning=3"), ("did you mean 'optimizer.",)),
        (("--device", "cuda:77"), ("--device 'cuda:77' cannot be used",)),
        (("--data", "/nowhere"), ("data folder /nowhere does not exist",)),
        (("--resume", "/nowhere/epoch_0002"), ("checkpoint /nowhere/epoch_0002 does not exist",)),
    ],
)
def test_mistakes_are_told_before_any_work(recipe_file, tree, tmp_path, capsys, more, words):
    assert train.main([str(recipe_file), "--data", str(tree), "--output", str(tmp_path / "o"), *more]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert not (tmp_path / "o").exists()


def test_a_recipe_and_data_are_asked_for(recipe_file, capsys):
    assert train.main([]) == 2
    assert train.main([str(recipe_file)]) == 2
    err = capsys.readouterr().err
    assert "give a recipe" in err
    assert "--data is missing" in err


def test_resume_refuses_weights_alone_and_other_classes(finished, recipe_file, tree, capsys):
    torch.save(torch.nn.Linear(2, 2).state_dict(), finished / "foreign.pth")
    assert run(recipe_file, tree, finished, "--resume", str(finished / "foreign.pth")) == 2
    assert "holds no recipe" in capsys.readouterr().err
    for split in ("train", "val"):
        (tree / split / "red").rename(tree / split / "rouge")
    assert run(recipe_file, tree, finished, "--resume") == 2
    assert "other classes" in capsys.readouterr().err


@pytest.mark.parametrize("amp", [pytest.param("float16", marks=pytest.mark.long), "bfloat16"])
def test_mixed_precision_resumes_too(recipe_file, tree, tmp_path, monkeypatch, amp):
    assert run(recipe_file, tree, tmp_path / "whole", "--amp", amp) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda self: os.kill(os.getpid(), signal.SIGINT))
        assert run(recipe_file, tree, tmp_path / "parts", "--amp", amp) == 130
    assert run(recipe_file, tree, tmp_path / "parts", "--amp", amp, "--resume") == 0
    assert bool(read(tmp_path / "parts")["scaler"]) == (amp == "float16")
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_model_of_the_library(recipe_file, tree, tmp_path):
    text = recipe_file.read_text().replace("proj_drop_rate", "drop_rate").replace("depth: 2", "depth: 1")
    recipe_file.write_text(text)
    more = ("--model", "test_vig", "--epochs", "1", "--set", "schedule.warmup_epochs=0")
    assert run(recipe_file, tree, tmp_path / "out", *more) == 0


class Scheduled(torch.nn.Module):
    """A classifier whose forward pass depends on the progress that it was told, with a loss of its own."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(3, num_classes)
        self.num_classes, self.done, self.told, self.seen = num_classes, 0.0, [], []

    def set_progress(self, done):
        self.done = done
        self.told.append(done)

    def forward(self, x):
        return self.fc(x.mean((2, 3))) * (1 + self.done)

    def forward_train(self, x):
        self.seen.append(self.done)
        return self(x), {"size": self.fc.weight.square().sum(), "five": x.new_tensor(5.0)}


@pytest.fixture
def scheduled(monkeypatch):
    """The models that runs make, which are `Scheduled` ones."""
    made = []

    def create_model(name, num_classes, **_):
        made.append(Scheduled(num_classes))
        return made[-1]

    monkeypatch.setattr(models, "create_model", create_model)
    return made


def test_a_schedule_of_the_models_own_is_told_the_share_of_steps_done(
    recipe_file, tree, tmp_path, scheduled, monkeypatch
):
    assert run(recipe_file, tree, tmp_path / "whole") == 0
    steps = [step / 12 for step in range(13)]
    assert scheduled[0].told == steps
    assert scheduled[0].seen == steps[:-1]
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda self: os.kill(os.getpid(), signal.SIGINT))
        assert run(recipe_file, tree, tmp_path / "halted") == 130
    assert run(recipe_file, tree, tmp_path / "halted", "--resume") == 0
    assert scheduled[2].seen == steps[8:-1]  # from the third epoch's first step
    same(tmp_path / "whole", tmp_path / "halted")  # the moving average was told the same


def test_losses_of_the_models_own_are_added_and_logged(recipe_file, tree, tmp_path, scheduled, monkeypatch):
    def without(self, x):
        return self(x), {}

    still = ("--epochs", "2", "--lr", "0", "--set", "schedule.min_lr=0", "--set", "schedule.warmup_epochs=0")
    assert run(recipe_file, tree, tmp_path / "with", *still) == 0
    monkeypatch.setattr(Scheduled, "forward_train", without)
    assert run(recipe_file, tree, tmp_path / "without", *still) == 0
    rows = {}
    for name in ("with", "without"):
        with (tmp_path / name / "summary.csv").open() as file:
            rows[name] = list(csv.DictReader(file))
    size = scheduled[0].fc.weight.square().sum().item()
    for row, plain in zip(rows["with"], rows["without"], strict=True):
        assert float(row["loss_five"]) == 5.0
        assert float(row["loss_size"]) == pytest.approx(size, rel=1e-6)
        assert float(row["train_loss"]) == pytest.approx(float(plain["train_loss"]) + 5 + size, rel=1e-6)
    assert "loss_five" not in rows["without"][0]


@pytest.mark.parametrize("copied", ["as made", "deepcopy", "meta start", "pickled"])
def test_weight_decay_spares_scan_parameters_norms_and_biases(monkeypatch, copied):
    """Decay rates, skips, step biases, norms and biases of scans are not decayed, also after copies of the model."""
    create = models.create_model

    def create_model(*args, **options):
        if copied == "meta start":
            with torch.device("meta"):
                model = create(*args, **options)
            model = model.to_empty(device="cpu")
            model.load_state_dict(create(*args, **options).state_dict())
            return model
        model = create(*args, **options)
        if copied == "pickled":
            return pickle.loads(pickle.dumps(model))
        return copy.deepcopy(model) if copied == "deepcopy" else model

    monkeypatch.setattr(models, "create_model", create_model)
    tree = {"model": {"name": "test_vmamba"}, "data": {"image_size": 64}, "optimizer": {"weight_decay": 0.3}}
    trainer = Trainer(recipe.from_dict(tree, "test"), ["a", "b"], 4, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed = {
        names[id(parameter)]: group["weight_decay"] > 0
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decayed.keys() == set(names.values())
    scan = ("A_log", "D", "delta_bias")
    assert {name.rpartition(".")[2] for name in decayed} >= set(scan)
    for name, is_decayed in decayed.items():
        leaf = name.rpartition(".")[2]
        spared = leaf in scan or leaf == "bias" or "norm" in name
        assert is_decayed == (not spared), name


@pytest.mark.long
def test_two_processes_train_as_one(recipe_file, tree, tmp_path):
    """torchrun on two CPU processes: every test image is counted once, and only the first process writes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tools" / "train.py"), str(recipe_file), "--data", str(tree), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert "of 9 images" in done.stdout
    assert done.stdout.count("epoch 3/3") == 1
    content = read(tmp_path / "out")
    assert content["step"] == 3 * (18 // 8)
    # The checkpoint's weights, tested here by one process, give the summed numbers.
    assert validate.main(["--checkpoint", str(last_of(tmp_path / "out")), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 9
    assert result["top1"] == pytest.approx(content["history"][-1]["test_top1"])
    assert result["loss"] == pytest.approx(content["history"][-1]["test_loss"], rel=1e-5)

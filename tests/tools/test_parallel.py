"""Training in 2 processes: sharded or not, equal to 1; checkpoints move between them; a killed process is no loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import STILL, VIT, begin, last_of, make, save, steps

from visionmix.tools import checkpoint

SCRIPT = Path(__file__).parents[1] / "support" / "parallel_runs.py"


def torchrun(*arguments, options=()):
    """Return what the first of 2 processes of `parallel_runs.py` printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command += [str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_sharded_training_equals_ddp():
    found = json.loads(torchrun("fsdp").splitlines()[-1])
    assert len(found) == 11
    for name, (loss, weight, learned) in found.items():
        # Muon's own iterations are in bfloat16, and sum up in another order.
        assert loss < (1e-3 if name == "muon" else 1e-5), (name, loss)
        assert weight < (1e-2 if name == "muon" else 1e-5), (name, weight)
        assert learned > 1e-3, name


@pytest.mark.long
def test_a_sharded_model_computes_in_the_type_of_the_recipe():
    found = json.loads(torchrun("policy").splitlines()[-1])
    plain, mixed, pure = (found[amp] for amp in ("none", "bfloat16", "pure_bfloat16"))
    assert plain[:2] == ["torch.float32", "torch.float32"]
    assert mixed[:2] == ["torch.bfloat16", "torch.float32"]
    assert pure[:2] == ["torch.bfloat16", "torch.bfloat16"]
    assert mixed[2] == pytest.approx(plain[2], rel=0.02)
    assert mixed[2] != plain[2]


@pytest.mark.long
def test_two_processes_and_accumulation_equal_one_process():
    found = json.loads(torchrun("batch").splitlines()[-1])
    assert found.keys() == {"one", "two", "accumulated", "both"}
    for name, (difference, learned) in found.items():
        assert difference < 1e-5, name
        assert learned > 1e-3, name


@pytest.mark.long
def test_checkpoints_of_one_process_load_in_two_and_in_shards_and_back(tmp_path):
    trainer = begin(**VIT, train={"ema_decay": 0.9})
    steps(trainer)
    trainer.finish_epoch({"test_top1": 50.0})
    trainer.step = trainer.steps = 10
    save(tmp_path / "one" / "epoch_0001", trainer)
    torchrun("move", tmp_path)
    contents = [checkpoint.read(tmp_path / name / "epoch_0001") for name in ("one", "shards", "ddp")]
    assert len(list((tmp_path / "shards" / "epoch_0001").glob("*.distcp"))) == 2
    one = contents[0]
    for content in contents[1:]:
        for part in ("model", "ema"):
            assert content[part].keys() == one[part].keys()
            assert all(torch.equal(content[part][name], value) for name, value in one[part].items())
        groups, ours = (part["optimizer"]["param_groups"] for part in (content, one))
        assert [group["params"] for group in groups] == [group["params"] for group in ours]
        for name, state in one["optimizer"]["state"].items():
            assert all(torch.equal(content["optimizer"]["state"][name][key], value) for key, value in state.items())
        assert (content["epoch"], content["step"], content["history"]) == (1, 10, [{"test_top1": 50.0}])
    again = begin(**VIT, train={"ema_decay": 0.9})
    again.load_state(contents[1], "shards")
    assert again.tested.state_dict().keys() == one["ema"].keys()
    assert all(torch.equal(again.tested.state_dict()[name], value) for name, value in one["ema"].items())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"channels_last": True}}, "train.channels_last=True does not go with train.parallel=fsdp"),
        ({"optimizer": {"clip_mode": "agc", "clip_grad": 1.0}}, "optimizer.clip_mode='agc' does not go with train"),
        ({"optimizer": {"name": "adahessian"}}, "optimizer.name='adahessian' does not go with train.parallel=fsdp"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(sections, words):
    with pytest.raises(ValueError, match=words):
        make(None, **sections | {"train": sections.get("train", {}) | {"parallel": "fsdp"}})
    make(None, **sections)


def test_one_process_has_nothing_to_shard():
    assert steps(begin(**VIT, train={"parallel": "fsdp"})) == steps(begin(**VIT))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path, make_images, kind):
    images = make_images(tmp_path / "images", train=22)  # 8 steps of 8 images
    settings = STILL | VIT | {"train": {"ema_decay": 0.9, "parallel": kind, "save_steps": 3}}
    settings["augment"] = {"mixup": 0.8}
    settings["schedule"] = {"epochs": 3, "warmup_epochs": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    printed = {}
    for name in ("whole", "disturbed"):
        (tmp_path / name).mkdir()
        if name == "whole":
            (tmp_path / name / "killed").touch()
        arguments = [tmp_path / "r.yaml", "--data", images, "--output", tmp_path / name / "out", "--device", "cpu"]
        printed[name] = torchrun("killed", tmp_path / name, *arguments, "--resume", options=["--max-restarts", "2"])
    assert "going on" not in printed["whole"]
    assert printed["disturbed"].count("going on from") == 1
    assert "epoch_0001_step_00000009, 1 of 3 epochs done and 1 of 8 steps of the next" in printed["disturbed"]
    whole, disturbed = (checkpoint.read(last_of(tmp_path / name / "out")) for name in printed)
    assert whole["step"] == disturbed["step"] == 24
    assert [numbers(row) for row in whole["history"]] == [numbers(row) for row in disturbed["history"]]
    for part in ("model", "ema"):
        assert all(torch.equal(disturbed[part][name], value) for name, value in whole[part].items())


def numbers(row):
    return {key: value for key, value in row.items() if not key.startswith(("seconds", "images_per_second"))}

"""Every example runs as its first lines say, where the library that it shows is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _hub, push_to_hf_hub

import visionmix

ROOT = Path(visionmix.__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "export_onnx")  # has its own test
# What an example imports besides the dependencies of the package.
NEEDS = {
    "fastai_classification": "fastai",
    "lightning_classification": "lightning",
    "smp_segmentation": "segmentation_models_pytorch",
    "transformers_detection": "transformers",
    "transformers_trainer": "accelerate",
}


@pytest.fixture(autouse=True)
def quiet_mmengine():
    """Replace the folder's fixture: examples need no OpenMMLab."""


def needed(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; run: pip install -e .[examples]")


def ran(folder, *command):
    """Return what a program printed, run in `folder` and without network."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder,
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_examples_are_short():
    assert len(EXAMPLES) >= 7
    assert set(NEEDS) <= {path.stem for path in EXAMPLES}
    files = [path for path in (ROOT / "examples").iterdir() if path.is_file()]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 60] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    needed(NEEDS.get(path.stem, "torch"))
    last = ran(tmp_path, str(path)).strip().splitlines()[-1]
    assert "test_" in last  # what it says of the tiny model
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith(".")] == []  # nothing is left behind


def test_pushed_to_the_hub_and_back(tmp_path, monkeypatch):
    class Hub:
        """The hub's interface, as far as timm calls it, over a folder."""

        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **_):
            return False

        def upload_folder(self, folder_path, **_):
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(_hub, "HfApi", Hub)
    torch.manual_seed(0)
    mixers = ["softmax", {"name": "window", "window_size": 5}, "cross_scan", "mala"]
    model = timm.create_model("test_pyramid", mixer=mixers, norm_layer="rmsnorm", num_classes=4, in_chans=1).eval()
    push_to_hf_hub(model, "somebody/something", safe_serialization=True, model_config={"label_names": list("abcd")})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["mixer"] == mixers
    assert (tmp_path / "README.md").exists()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 1, 64, 96)
    assert torch.equal(again(images), model(images))
    assert again.pretrained_cfg["label_names"] == list("abcd")


def test_timms_own_train_and_validate(tmp_path):
    """Runs with the variable TIMM_REPOSITORY, a clone of timm, whose programs no wheel has."""
    clone = os.environ.get("TIMM_REPOSITORY")
    if not clone:
        pytest.skip("timm's train.py is not in its wheel; set TIMM_REPOSITORY to a clone of it")
    from PIL import Image

    for number in range(8):
        for split in ("train", "validation"):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 72), (number * 30, 90, 60)).save(path)
    options = ["--data-dir", "data", "--model", "test_vmamba", "--num-classes", "2", "-b", "4", "--workers", "1"]
    options += ["--device", "cpu", "--model-kwargs", "mixer='softmax'"]
    train = ["--device-modules", "visionmix", "--epochs", "1", "--warmup-epochs", "0", "--input-size", "3", "64", "64"]
    out = ran(tmp_path, f"{clone}/train.py", *options, *train, "--output", "runs", "--experiment", "one")
    assert '"validation"' in out
    code = "import runpy, sys, visionmix; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    validate = ["--img-size", "64", "--checkpoint", "runs/one/last.pth.tar", "--split", "validation"]
    assert '"top1"' in ran(tmp_path, "-c", code, f"{clone}/validate.py", *options, *validate)

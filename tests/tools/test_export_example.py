"""The examples of an export run, and print what the model computes."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionmix.tools import export

EXAMPLE = Path(__file__).parents[2] / "examples" / "export_onnx.py"


def test_the_example_classifies_a_picture_at_two_sizes(tmp_path, monkeypatch, capsys):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    model = timm.create_model("test_van").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    files = ["--checkpoint", str(tmp_path / "weights.pth"), "--image", str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(tmp_path / "m.onnx"), *files])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if " pixels: " in line]
    assert len(lines) == 2
    for line in lines:
        side = int(line.split()[0])
        resized = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        resized = (resized - np.float32(model.pretrained_cfg["mean"])) / np.float32(model.pretrained_cfg["std"])
        with torch.inference_mode():
            logits = model(torch.from_numpy(resized.transpose(2, 0, 1)[None]))[0]
        assert f"class {logits.argmax().item()}, logit {logits.max().item():.3f}" in line


@pytest.mark.long
def test_the_example_in_cpp_classifies_a_picture_without_python(tmp_path, capsys):
    """As its first lines say, but for a tiny model."""
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    program = EXAMPLE.with_name("classify.cpp")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.ppm")
    package = str(tmp_path / "m.pt2")
    options = ["--random-weights", "--img-size", "64", "--format", "pt2", "--aot", "--out", package]
    assert export.main(["test_agent_deit_tiny", *options]) == 0, capsys.readouterr().err
    folder, built = torch.__path__[0], str(tmp_path / "classify")
    libraries = [f"-L{folder}/lib", f"-Wl,-rpath,{folder}/lib,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = ["-std=c++20", "-O2", f"-I{folder}/include", str(program), "-o", built]
    subprocess.run([compiler, *source, *libraries], check=True)
    commands = "".join(line.lstrip("/ ") + "\n" for line in program.read_text().splitlines() if line.startswith("//"))
    assert all(option.replace(folder, "$TORCH") in commands for option in [*source[:3], *libraries])

    called = [built, package, str(tmp_path / "picture.ppm")]
    printed = subprocess.run(called, check=True, capture_output=True, text=True).stdout
    torch.manual_seed(0)  # the command's random weights
    model = timm.create_model("test_agent_deit_tiny").eval()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = model((image - mean) / std)[0]
    number, logit = printed.removeprefix("class ").split(", logit ")
    assert int(number) == logits.argmax().item()
    assert float(logit) == pytest.approx(logits.max().item(), abs=1e-4)
    refused = subprocess.run([*called[:2], str(program)], check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no binary PPM" in refused.stderr

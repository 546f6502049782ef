"""The example of an export runs, and prints what the model computes."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

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

"""The worked example of CONTRIBUTING.md runs."""

import copy
import importlib.util
import re
from pathlib import Path

import timm
import torch

import visionmix
from visionmix.mixers import registry
from visionmix.models import family


def test_the_example_family_makes_models(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(), re.S)
    monkeypatch.setattr(registry, "_MIXERS", copy.deepcopy(registry._MIXERS))
    monkeypatch.setattr(family, "_FAMILIES", dict(family._FAMILIES))
    file = tmp_path / "example_family.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("example_family", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "example_family", module)
    spec.loader.exec_module(module)
    assert visionmix.models.published("pool_s12.in1k").top1 == 77.2
    assert "pool_s12.in1k" in timm.list_pretrained("pool_s12*")
    assert visionmix.mixers.Pool is module.Pool
    parameters = sum(value.numel() for value in timm.create_model("pool_s12", device="meta").parameters())
    assert round(parameters / 1e6) == visionmix.models.published("pool_s12").params
    model = timm.create_model("test_pool").eval()
    images = torch.randn(1, 3, 64, 96)
    assert model(images).shape == (1, 1000)
    assert torch.allclose(torch.jit.script(model)(images), model(images), atol=1e-6)

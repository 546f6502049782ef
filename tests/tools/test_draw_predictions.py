"""tools/draw_predictions.py draws the model that the checkpoint holds, or none."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from visionmix.tools import draw_predictions, openmmlab


class Detector(nn.Module):
    """A model as mmengine builds it; `test_step` predicts one box."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(2, classes)

    def test_step(self, batch):
        truth = SimpleNamespace(bboxes=torch.tensor([[1.0, 1, 5, 5]]))
        found = SimpleNamespace(bboxes=truth.bboxes, scores=torch.tensor([0.9]))
        return [Sample(gt_instances=truth, pred_instances=found)]


class Sample(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


@pytest.fixture
def mmengine(monkeypatch):
    """Stand-ins for the parts of mmengine that the tool uses."""

    def load_checkpoint(model, file, map_location, strict=False):
        model.load_state_dict(torch.load(file)["state_dict"], strict=strict)

    image = {"inputs": torch.zeros(3, 8, 8, dtype=torch.uint8)}
    parts = {
        "mmengine": {},
        "mmengine.config": {"ConfigDict": dict},
        "mmengine.dataset": {"pseudo_collate": lambda items: {"inputs": [item["inputs"] for item in items]}},
        "mmengine.registry": {
            "DATASETS": SimpleNamespace(build=lambda config: [image] * 3),
            "MODELS": SimpleNamespace(build=Detector),
            "init_default_scope": lambda scope: None,
        },
        "mmengine.runner": {"load_checkpoint": load_checkpoint},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    loader = SimpleNamespace(dataset={})
    config = SimpleNamespace(default_scope="mmdet", model=4, val_dataloader=loader)
    monkeypatch.setattr(openmmlab, "installed", lambda: True)
    monkeypatch.setattr(openmmlab, "read", lambda name, data: config)


def test_draws_truth_and_prediction(mmengine, tmp_path):
    torch.save({"state_dict": Detector(4).state_dict()}, tmp_path / "good.pth")
    out = tmp_path / "drawn.png"
    assert draw_predictions.main(["config.py", str(tmp_path / "good.pth"), "--count", "2", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 2


@pytest.mark.parametrize("state", [Detector(3).state_dict(), {}, {**Detector(4).state_dict(), "more": torch.zeros(1)}])
def test_a_checkpoint_of_another_model_is_refused(mmengine, tmp_path, capsys, state):
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    out = tmp_path / "drawn.png"
    assert draw_predictions.main(["config.py", str(tmp_path / "other.pth"), "--out", str(out)]) == 1
    assert "other.pth does not hold the weights of the config's model" in capsys.readouterr().err
    assert not out.exists()

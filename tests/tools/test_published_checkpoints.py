"""Files as their authors publish them, in the tools."""

import argparse

import golden
import pytest
import timm
import torch

from visionmix.tools import build

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["vig_t", "agent_pvt_tiny"])
def test_published_file_with_a_configuration_inside(name, tmp_path):
    meta, arrays = golden.load(name)
    content = {"model": golden.state_dict(meta), "config": argparse.Namespace(epochs=300)}
    torch.save(content, tmp_path / "published.pth")
    model = build.load_trained(str(tmp_path / "published.pth"), name=name, device=CPU).model
    with torch.no_grad():
        assert golden.relative_error(model(golden.image(*meta["image_size"])), arrays["logits"]) <= 1e-5


@pytest.mark.parametrize("classes", [None, 3])
def test_file_whose_classifier_does_not_fit_is_refused(classes, tmp_path):
    made = timm.create_model("test_vig", num_classes=5).state_dict()
    torch.save(made, tmp_path / "five.pth")
    with pytest.raises(ValueError, match=r"head\.fc\.weight.*classes"):
        build.load_trained(str(tmp_path / "five.pth"), name="test_vig", classes=classes, device=CPU)
    torch.save({key: value for key, value in made.items() if not key.startswith("head.")}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"none\.pth has no head\.fc\.weight"):
        build.load_trained(str(tmp_path / "none.pth"), name="test_vig", classes=classes, device=CPU)
    assert build.load_trained(str(tmp_path / "five.pth"), name="test_vig", classes=5, device=CPU).model.num_classes == 5

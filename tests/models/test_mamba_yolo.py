"""Mamba-YOLO's backbone: files of whole detectors, the pyramid that a detector reads, classifiers asked for."""

import logging

import golden
import pytest
import timm
import torch

from visionmix.models import published

NAME = "mamba_yolo_t_backbone"


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The backbone's tensors as the detector's file has them, with one of the neck and one of the head."""
    tensors = golden.state_dict(golden.load(NAME)[0])
    tensors |= {"model.11.proj_conv.0.weight": torch.zeros(8, 8, 1, 1), "model.21.dfl.conv.weight": torch.zeros(1)}
    file = tmp_path_factory.mktemp("files") / "detector.pth"
    torch.save({"model": tensors}, file)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}


def test_detector_file_loads_without_a_warning(detector, caplog):
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(NAME, **detector).eval()
    assert not caplog.records
    assert model.num_classes == model.default_cfg["num_classes"] == 0
    filled = golden.state_dict(golden.load(NAME)[0])
    assert torch.equal(model.stages[2].blocks[2].mixer.scan.D.flatten(), filled["model.5.2.op.Ds"])
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 256)


def test_a_classifier_is_fresh_and_says_so(detector, caplog):
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(NAME, num_classes=7, **detector).eval()
    assert "has no classifier" in caplog.text
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 7)


@pytest.mark.parametrize(("size", "widths", "blocks"), [
    ("t", (32, 64, 128, 256), (1, 1, 3, 1)),
    ("b", (64, 128, 256, 512), (1, 1, 3, 1)),
    ("l", (96, 192, 384, 576), (2, 2, 6, 2)),
])  # fmt: skip
def test_sizes_are_the_published_multiples(size, widths, blocks):
    """Of 128, 256, 512, 1024 channels and 3, 3, 9, 3 blocks, in the published configurations."""
    with torch.device("meta"):
        model = timm.create_model(f"mamba_yolo_{size}_backbone")
    assert tuple(info["num_chs"] for info in model.feature_info) == widths
    assert tuple(len(stage.blocks) for stage in model.stages) == blocks
    assert published(f"mamba_yolo_{size}_backbone").license == "agpl-3.0"


def test_a_detector_reads_strides_8_to_32_of_any_image():
    features = timm.create_model("test_mamba_yolo", features_only=True).eval()
    assert features.feature_info.reduction() == [8, 16, 32]
    for height, width in ((64, 96), (33, 57), (4, 7)):
        maps = features(torch.randn(1, 3, height, width))
        for reduction, each in zip((8, 16, 32), maps, strict=True):
            assert each.shape[2:] == (-(-height // reduction), -(-width // reduction))

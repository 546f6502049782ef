"""Every form in which VMamba's and MSVMamba's files name and shape the same tensors."""

import re

import golden
import pytest
import timm
import torch

from visionmix import create_mixer
from visionmix.models import load_checkpoint
from visionmix.models.keys import regrouped


def old(key: str) -> str:
    """Return the name that the first files have for `key`."""
    for pattern, name in (
        (r"^patch_embed\.0", "patch_embed.proj"),
        (r"^patch_embed\.2", "patch_embed.norm"),
        (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
        (r"\.op\.", ".self_attention."),
        (r"^classifier\.", ""),
    ):
        key = re.sub(pattern, name, key)
    return key


def latest(key: str) -> str:
    """Return the name that the latest code has for `key`, of a model with patch merging."""
    key = key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight")
    return key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2")


def load(tensors, name="vmamba_tiny_v0"):
    model = timm.create_model(name)
    load_checkpoint(model, tensors)
    return model.state_dict()


@pytest.fixture(scope="module")
def tensors():
    return golden.state_dict(golden.load("vmamba_tiny_v0")[0])


@pytest.mark.parametrize("rename", [old, latest])
def test_files_with_former_names_load(tensors, rename):
    expected = load(tensors)
    again = load({rename(key): value for key, value in tensors.items()})
    assert all(torch.equal(value, expected[key]) for key, value in again.items())


def test_linear_layers_saved_as_convolutions():
    tensors = golden.state_dict(golden.load("vmamba_tiny")[0])
    linear = re.compile(r"(in_proj|out_proj|fc\d)\.weight$")
    conv = {key: value[:, :, None, None] if linear.search(key) else value for key, value in tensors.items()}
    assert sum(value.ndim == 4 for value in conv.values()) > sum(value.ndim == 4 for value in tensors.values())
    expected = load(tensors, "vmamba_tiny")
    assert all(torch.equal(value, expected[key]) for key, value in load(conv, "vmamba_tiny").items())


def test_the_low_resolution_comes_first():
    tensors = golden.state_dict(golden.load("msvmamba_nano")[0])
    loaded = load(tensors, "msvmamba_nano")
    stacked = tensors["layers.2.blocks.3.op.A_logs"]
    assert torch.equal(loaded["stages.2.blocks.3.mixer.low_scan.A_log"][0], stacked[:384])
    assert torch.equal(loaded["stages.2.blocks.3.mixer.full_scan.A_log"][0], stacked[384:])


def test_the_full_resolution_comes_first_in_the_later_release():
    tensors = golden.state_dict(golden.load("msvmambav3_tiny")[0])
    loaded = load(tensors, "msvmambav3_tiny")
    stacked = tensors["layers.2.blocks.3.op.A_logs"]
    assert torch.equal(loaded["stages.2.blocks.3.mixer.full_scan.A_log"][0], stacked[:384])
    assert torch.equal(loaded["stages.2.blocks.3.mixer.low_scan.A_log"][0], stacked[384:])


def test_scans_at_two_resolutions_are_enlarged_in_two_ways():
    with pytest.raises(ValueError, match="enlarge='bicubic' is unknown; give 'bilinear' or 'nearest'"):
        create_mixer("multi_scale_scan", 24, enlarge="bicubic")


def test_only_the_grouping_of_axes_may_differ():
    for shape in ((4, 6, 1, 1), (24,), (2, 2, 6)):
        assert regrouped(torch.zeros(shape), (4, 6)).shape == (4, 6)
    for shape in ((6, 4), (4, 5), (8, 3), (3, 8)):
        assert regrouped(torch.zeros(shape), (4, 6)).shape == shape


@pytest.mark.parametrize("name", ["vmamba_tiny_s2l5", "vmamba_tiny_v0", "vmamba_small"])
def test_another_variants_file_is_refused(name):
    tensors = golden.state_dict(golden.load("vmamba_tiny")[0])
    with torch.device("meta"), pytest.raises(ValueError, match=f"not {name}'s"):
        load(tensors, name)


def test_files_without_a_link_say_where_they_lie():
    with torch.device("meta"), pytest.raises(ValueError, match=r"drive\.google\.com/drive/folders/1J41w3A"):
        timm.create_model("msvmamba_nano", pretrained=True)

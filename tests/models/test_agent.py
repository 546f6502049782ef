"""The agent models: agents and windows of every layout, and their files at other sizes."""

import pickle

import golden
import pytest
import timm
import torch
from torch import nn

from visionmix.mixers import AgentAttention
from visionmix.models import load_checkpoint


def mixers(name, **options):
    """Return of each block its agents, or its window and shift, or its mixer's name."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    blocks = model.blocks if hasattr(model, "blocks") else [block for stage in model.stages for block in stage.blocks]
    described = []
    for block in blocks:
        mixer = block.mixer
        if isinstance(mixer, AgentAttention):
            described.append(mixer.side**2)
        else:
            described.append((mixer.side, mixer.shift_size) if hasattr(mixer, "shift_size") else type(mixer).__name__)
    return described


def test_agents_and_windows_of_every_layout():
    assert mixers("agent_deit_tiny") == [49] * 12
    assert mixers("agent_deit_base") == [81] * 4 + ["SoftmaxAttention"] * 8
    assert mixers("agent_pvt_small") == [9] * 3 + [16] * 4 + [49] * 9
    assert mixers("agent_swin_tiny") == [9] * 2 + [16] * 2 + [49] * 6 + [(7, 0)] * 2
    assert mixers("agent_swin_small") == [9] * 2 + [16] * 2 + [(7, 0), (7, 3)] * 9 + [(7, 0)] * 2
    assert mixers("agent_swin_base") == [9] * 2 + [16] * 2 + [49] * 2 + [(7, 0), (7, 3)] * 8 + [(7, 0)] * 2
    assert mixers("agent_cswin_tiny") == [9] * 2 + [16] * 4 + ["CrossWindowAttention"] * 19


@pytest.mark.parametrize(("size", "side"), [(288, 9), (384, 12)])
def test_windows_follow_the_built_size(size, side):
    blocks = mixers("agent_swin_small", img_size=size)
    assert blocks[4:] == [(side, 0), (side, side // 2)] * 9 + [(side, 0)] * 2


def test_set_input_size_equals_building_at_the_size():
    torch.manual_seed(0)
    built = timm.create_model("test_agent_swin", img_size=288)
    set_later = timm.create_model("test_agent_swin")
    set_later.set_input_size(288)
    shapes = {key: value.shape for key, value in set_later.state_dict().items()}
    assert shapes == {key: value.shape for key, value in built.state_dict().items()}
    set_later.load_state_dict(built.state_dict())
    image = golden.image(288, 288)
    assert torch.equal(set_later.eval()(image), built.eval()(image))


def test_whole_models_are_pickled():
    model = timm.create_model("test_agent_swin").eval()
    again = pickle.loads(pickle.dumps(model))
    image = golden.image(96, 96)
    assert torch.equal(again(image), model(image))


@pytest.mark.parametrize("name", ["agent_swin_tiny", "agent_deit_tiny"])
def test_files_load_at_another_size(name):
    tensors = golden.state_dict(golden.load(name)[0])
    model = timm.create_model(name, img_size=288, num_classes=5)
    load_checkpoint(model, tensors)
    owners = [module for module in model.modules() if isinstance(module, AgentAttention)]
    own = timm.create_model(name)
    load_checkpoint(own, tensors)
    first = next(module for module in own.modules() if isinstance(module, AgentAttention))
    expected = nn.functional.interpolate(first.query_rows, size=owners[0].query_rows.shape[2], mode="linear")
    assert torch.allclose(owners[0].query_rows, expected, atol=1e-6)
    assert model(golden.image(288, 288)).shape == (1, 5)


def test_file_of_another_host_is_refused():
    tensors = golden.state_dict(golden.load("agent_pvt_tiny")[0])
    with torch.device("meta"):
        model = timm.create_model("agent_swin_tiny")
    with pytest.raises(ValueError, match="not agent_swin_tiny's"):
        load_checkpoint(model, tensors)

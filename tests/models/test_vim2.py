"""ViM2: sums of earlier outputs, and a mixer along the channels."""

import pytest
import timm
import torch
from drawn import drawn_mixer
from torch import nn

from visionmix import create_mixer


def test_a_stage_feeds_every_block_with_all_earlier_outputs():
    torch.manual_seed(0)
    stage = timm.create_model("test_vim2").stages[1].eval()
    for earlier in stage.sums:
        nn.init.normal_(earlier.weight)
    x = torch.randn(2, 24, 24, 8)
    with torch.no_grad():
        outputs = [stage.downsample(x)]
        for earlier, block in zip(stage.sums, stage.blocks, strict=True):
            weights = earlier.weight[:, None, None, None, None]
            outputs.append(block((weights * torch.stack(outputs)).sum(0)))
        assert torch.allclose(stage(x), outputs[-1], atol=1e-5)


def test_a_fresh_stage_is_a_chain_of_blocks():
    torch.manual_seed(0)
    stage = timm.create_model("test_vim2").stages[1].eval()
    x = torch.randn(1, 24, 24, 8)
    with torch.no_grad():
        assert torch.allclose(stage(x), nn.Sequential(stage.downsample, *stage.blocks)(x), atol=1e-6)
    assert [earlier.weight.tolist() for earlier in stage.sums] == [[1], [0, 1], [0, 0, 1]]


def test_the_channel_mixer_is_mamba_along_the_channels_of_each_cell():
    mixer = drawn_mixer("selective_channel", features=3).double()
    mamba = create_mixer("bidirectional_mamba", 1, expand=3).double()
    mamba.load_state_dict(mixer.scan.state_dict())
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    with torch.no_grad():
        out = mixer(x)
        for row in range(3):
            for column in range(4):
                channels = mamba(x[:, row, column, None, :, None])[:, 0, :, 0]
                assert torch.allclose(out[:, row, column], mixer.proj(channels), atol=1e-12)


def test_the_channel_mixer_names_mistakes():
    with pytest.raises(ValueError, match="features=0 leaves nothing to scan; give 1 or more"):
        create_mixer("selective_channel", 12, features=0)

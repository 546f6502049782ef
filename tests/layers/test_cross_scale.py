"""CrossViT's exchange of class tokens against timm's model."""

import pytest
import torch
from timm.models.crossvit import MultiScaleBlock
from torch import nn

from visionmix.layers import CrossScaleTokens

_NAMES = {"projs": "to_other", "revert_projs": "back"}


def test_class_tokens_are_those_of_timm():
    torch.manual_seed(0)
    theirs = MultiScaleBlock(
        (12, 8), (9, 4), (1, 1, 0), (3, 2), (1, 1, 1), qkv_bias=True, drop_path=[0.0], dtype=torch.float64
    )
    theirs.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    for value in theirs.parameters():
        nn.init.normal_(value)
    own = {}
    for key, value in theirs.state_dict().items():
        part, place, leaf = key.split(".", 2)
        if part == "fusion":  # timm numbers it by the class token's scale
            own[f"attend.{1 - int(place)}.{leaf}"] = value
        else:
            own[f"{_NAMES[part]}.{place}.{leaf}"] = value
    layer = CrossScaleTokens((12, 8), (3, 2), dtype=torch.float64)
    layer.load_state_dict(own)
    first, second = torch.randn(2, 10, 12, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    for ours, expected in zip(layer(first, second), theirs([first, second]), strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


def test_only_class_tokens_change_and_each_sees_all_patches_of_the_other():
    layer = CrossScaleTokens((12, 8), (3, 2))
    first, second = torch.randn(2, 10, 12), torch.randn(2, 5, 8, requires_grad=True)
    new_first, new_second = layer(first, second)
    assert torch.equal(new_first[:, 1:], first[:, 1:])
    assert torch.equal(new_second[:, 1:], second[:, 1:])
    new_first[:, 0].square().sum().backward()
    assert second.grad[:, 1:].abs().sum(-1).min() > 0
    assert not second.grad[:, 0].any()
    torch.jit.script(layer)(first, second)


@pytest.mark.parametrize(
    ("dims", "heads", "message"),
    [
        ((12, 8, 4), (3, 2), "are not of two scales"),
        ((12, 8), (3, 3), r"num_heads=\(3, 3\) do not divide dims=\(12, 8\)"),
    ],
)
def test_bad_options_are_named(dims, heads, message):
    with pytest.raises(ValueError, match=message):
        CrossScaleTokens(dims, heads)

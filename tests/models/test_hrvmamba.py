"""HRVMamba: its parameters, and its convolution of several scales."""

import pytest
import timm
import torch

from visionmix.models.hrvmamba import _MultiScaleConv


@pytest.mark.parametrize(("name", "millions"), [
    ("hrvmamba_nano", 12.28), ("hrvmamba_tiny", 14.07), ("hrvmamba_small", 20.10), ("hrvmamba_base", 60.55)
])  # fmt: skip
def test_parameters_are_those_of_the_published_code(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 2) == millions


def test_channels_of_the_kernels_take_turns():
    layer = _MultiScaleConv(8, dtype=torch.float64)
    layer.act = torch.nn.Identity()
    for conv in layer.convs:
        torch.nn.init.constant_(conv.weight, 1.0)
        torch.nn.init.zeros_(conv.bias)
    x = torch.zeros(1, 11, 11, 8, dtype=torch.float64)
    x[0, 5, 5] = torch.arange(1.0, 9.0)
    out = layer(x)
    # The channels of a kernel lie side by side before it, and four apart behind it.
    assert out[0, 5, 5].tolist() == [1, 3, 5, 7, 2, 4, 6, 8]
    assert [(each > 0).sum().item() for each in out[0].unbind(-1)] == [9, 25, 49, 81] * 2
    with pytest.raises(ValueError, match="dim=6 has no 4 equal parts; give a multiple of 4"):
        _MultiScaleConv(6)

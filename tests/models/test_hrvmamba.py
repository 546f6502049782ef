"""HRVMamba: the variants of which no published output lies here, by their parameters and by the names in their files."""

import golden
import pytest
import timm
import torch

from visionmix.models.family import variant_of
from visionmix.models.hrvmamba import _MultiScaleConv


@pytest.mark.parametrize(("name", "millions"), [
    ("hrvmamba_nano", 12.28), ("hrvmamba_tiny", 14.07), ("hrvmamba_small", 20.10), ("hrvmamba_base", 60.55)
])  # fmt: skip
def test_parameters_are_those_of_the_published_code(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "of"), [("hrvmamba_tiny", "hrvmamba_nano"), ("hrvmamba_base", "hrvmamba_small__256x256")]
)
def test_files_of_the_other_sizes_have_names_for_everything(name, of):
    keys = [key for key, _ in golden.load(of)[0]["filled"]]
    if name == "hrvmamba_base":
        keys += [key.replace("offset_mask.", "offset_mask_dw.") for key in keys if ".offset_mask." in key]
    mapped = variant_of(name).layout.keys({key: torch.zeros(0) for key in keys})
    with torch.device("meta"):
        assert mapped.keys() == timm.create_model(name).state_dict().keys()


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

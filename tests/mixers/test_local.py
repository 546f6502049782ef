"""LocalMamba's mixers against their formulas, off the square too, and the published code's column inverse."""

import pytest
import timm
import torch
from torch.nn import functional as F

import visionmix

MIXERS = ["local_scan", "multi_mamba"]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_multi_mamba_equals_its_formula(gate, published):
    torch.manual_seed(0)
    names = ["raster", "column_reversed", "window_2"]
    options = {"directions": names, "channel_gate": gate, "published_inverse": published}
    mixer = visionmix.create_mixer("multi_mamba", 6, d_state=3, **options).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    u, z = (x.flatten(1, 2) @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    out = 0
    for name, scan in zip(names, mixer.scans, strict=True):
        name = name.replace("column", "column_unswapped") if published else name
        index, inverse = visionmix.scans.order(name, 3, 5)
        padded, gates = (F.pad(each, (0, 0, 0, 1))[:, index] for each in (u, F.silu(z)))
        y = (scan(padded) * gates)[:, inverse]
        if gate:
            layers = mixer.channel_gate
            pooled = layers.norm(y).mean(dim=1, keepdim=True)
            out = out + y * torch.sigmoid(layers.fc2(F.gelu(layers.fc1(pooled))))
        else:
            out = out + y / 3
    assert torch.allclose(mixer(x).flatten(1, 2), out @ mixer.proj.weight.T, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_the_published_inverse_is_right_on_squares_only(name):
    options = {"directions": ["raster", "column", "column_reversed"]}
    right, theirs = (visionmix.create_mixer(name, 8, published_inverse=flag, **options) for flag in (False, True))
    theirs.load_state_dict(right.state_dict())
    square, other = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 6, 8)
    assert torch.allclose(right(square), theirs(square), atol=1e-6)
    assert not torch.allclose(right(other), theirs(other), atol=1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_columns_are_rows_of_the_transposed_map(name):
    rows, columns = (visionmix.create_mixer(name, 8, directions=[order]) for order in ("raster", "column"))
    columns.load_state_dict(rows.state_dict())
    if name == "local_scan":
        columns.conv.weight.data = rows.conv.weight.data.mT.contiguous()
    x = torch.randn(1, 4, 6, 8)
    assert torch.allclose(columns(x), rows(x.transpose(1, 2)).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", ["test_local_vim", "test_local_vim_middle_cls_token", "test_local_vmamba"])
def test_models_hand_the_published_inverse_to_their_mixers(name):
    right, theirs = (timm.create_model(name, published_inverse=flag).eval() for flag in (False, True))
    theirs.load_state_dict(right.state_dict())
    x = torch.randn(1, 3, 96, 128)
    assert not torch.allclose(right.forward_features(x), theirs.forward_features(x), atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("directions", ["raster", []])
def test_directions_are_a_sequence_of_orders(name, directions):
    with pytest.raises(ValueError, match="must be a sequence of scan orders"):
        visionmix.create_mixer(name, 8, directions=directions)


def test_joined_orders_are_refused():
    with pytest.raises(ValueError, match=r"order='msvmamba_lowres' has 'raster_reversed\+.* more than once"):
        visionmix.create_mixer("multi_mamba", 8, order="msvmamba_lowres")

"""Vim: where its class token stands, how its mixer reads maps in other orders, and its strides."""

import golden
import pytest
import timm
import torch
from torch.nn import functional as F

import visionmix
from visionmix.layers import Grid
from visionmix.models import load_checkpoint


def scanned(scan, x):
    """Return the convolution and scan of x (batch, length, dim), token by token."""
    u = F.conv1d(F.pad(x.mT, (3, 0)), scan.conv.weight, scan.conv.bias, groups=x.shape[2])
    u = F.silu(u).mT
    low, B, C = (u @ scan.x_proj.weight.T).split(scan.widths, dim=-1)
    delta = F.softplus(low @ scan.delta_weight[0].T + scan.delta_bias[0])
    state, out = torch.zeros(len(x), x.shape[2], B.shape[2], dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = torch.exp(-delta[:, t, :, None] * scan.A_log[0].exp()) * state
        state = state + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1) + scan.D[0] * u[:, t])
    return torch.stack(out, dim=1)


def mixed(mixer, x, index, inverse):
    """Return what the mixer makes of the tokens x, read in the order `index`."""
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    u = F.pad(u, (0, 0, 0, 1))[:, index]
    y = (scanned(mixer.forward_scan, u) + scanned(mixer.backward_scan, u.flip(1)).flip(1)) / 2
    y = F.pad(y, (0, 0, 0, 1))[:, inverse]
    return (y * F.silu(z)) @ mixer.proj.weight.T


@pytest.mark.parametrize("order", ["raster", "hilbert", "snake_transposed", "window_2", "skip_2_0_0"])
def test_bidirectional_mamba_equals_formula_in_any_order(order):
    torch.manual_seed(0)
    mixer = visionmix.create_mixer("bidirectional_mamba", 6, d_state=3, order=order).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    index, inverse = visionmix.scans.order(order, 3, 5)
    expected = mixed(mixer, x.flatten(1, 2), index, inverse)
    assert torch.allclose(mixer(x).flatten(1, 2), expected, atol=1e-12)


@pytest.mark.parametrize("order", ["raster", "hilbert", "window_2"])
@pytest.mark.parametrize("prefix", [[0], [7], [0, 3], [15]])
def test_class_tokens_keep_their_places(order, prefix):
    torch.manual_seed(0)
    mixer = visionmix.create_mixer("bidirectional_mamba", 6, d_state=3, order=order).double()
    x = torch.randn(2, 15 + len(prefix), 6, dtype=torch.float64)
    cells = [position for position in range(x.shape[1]) if position not in prefix]
    index = [cells[cell] if cell >= 0 else -1 for cell in visionmix.scans.order(order, 3, 5).index.tolist()]
    for position in prefix:
        index.insert(position, position)
    inverse = [index.index(position) for position in range(x.shape[1])]
    expected = mixed(mixer, x, torch.tensor(index), torch.tensor(inverse))
    assert torch.allclose(mixer.forward_tokens(x, Grid(3, 5, prefix, None)), expected, atol=1e-12)


def test_the_class_token_and_its_position_stand_in_the_middle():
    tensors = golden.state_dict(golden.load("vim_tiny")[0])
    model = timm.create_model("vim_tiny")
    load_checkpoint(model, tensors)
    assert torch.equal(model.class_token.pos_embed[0, 0], tensors["pos_embed"][0, 98])
    cells = torch.cat([tensors["pos_embed"][:, :98], tensors["pos_embed"][:, 99:]], dim=1)
    assert torch.equal(model.pos_embed.weight.flatten(1, 2), cells)
    x, grid = model.embed(torch.randn(1, 3, 64, 96))
    assert (x.shape[1], grid.prefix_positions) == (25, [12])


def test_vim_loads_at_another_size():
    tensors = golden.state_dict(golden.load("vim_tiny")[0])
    natural, built = timm.create_model("vim_tiny").eval(), timm.create_model("vim_tiny", img_size=(96, 128)).eval()
    for model in (natural, built):
        load_checkpoint(model, tensors)
    image = golden.image(96, 128)
    with torch.no_grad():
        assert torch.allclose(natural(image), built(image), atol=1e-5)


def test_overlapping_patches():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_stride8")
        features, maps = model.forward_intermediates(torch.empty(1, 3, 224, 224), indices=1)
    assert (features.shape, maps[0].shape) == ((1, 730, 192), (1, 192, 27, 27))
    assert model.feature_info[0]["reduction"] == 8
    assert model.default_cfg["pool_size"] == (27, 27)


def test_kept_tokens_equal_a_sequence_with_zeros_between():
    """Behind the convolution, which sees what is left: the scans are those of the whole sequence, zeros in the gaps."""
    torch.manual_seed(0)
    mixer = visionmix.create_mixer("bidirectional_mamba", 6, d_state=3, d_conv=1).double()
    with torch.no_grad():  # so that a token of zeros stays one
        for scan in (mixer.forward_scan, mixer.backward_scan):
            scan.conv.bias.zero_()
    positions = torch.tensor([[0, 3, 4, 9], [2, 5, 6, 10]])
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    whole = torch.zeros(2, 11, 6, dtype=torch.float64).scatter(1, positions[..., None].expand(-1, -1, 6), x)
    expected = [each.gather(1, positions[..., None].expand(-1, -1, 12)) for each in mixer.directions(whole)]
    for ours, theirs in zip(mixer.directions(x, positions), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    near = torch.arange(4).expand(2, -1)
    assert torch.allclose(mixer.merged(*mixer.directions(x, near)), mixer.forward_tokens(x, Grid(1, 4, [], None)))
    assert not torch.allclose(mixer.directions(x)[0], expected[0], atol=1e-6)

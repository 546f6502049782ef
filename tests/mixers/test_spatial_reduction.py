"""Attention to a smaller map against its definition."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import RepBN

spatial_reduction = partial(drawn_mixer, "spatial_reduction", num_heads=3)


def defined(mixer, x):
    """The definition: every square is one key by a matrix product, every head by itself."""
    batch, height, width, dim = x.shape
    side = mixer.sr_ratio
    padded = F.pad(x, [0, 0, 0, max(0, side - width), 0, max(0, side - height)])
    kernel = mixer.sr.weight.permute(2, 3, 1, 0).reshape(-1, dim)
    squares = [
        padded[:, side * row : side * (row + 1), side * column : side * (column + 1)].flatten(1) @ kernel
        for row in range(max(1, height // side))
        for column in range(max(1, width // side))
    ]
    smaller = F.layer_norm(
        torch.stack(squares, dim=1) + mixer.sr.bias, (dim,), mixer.norm.weight, mixer.norm.bias, 1e-5
    )
    out = []
    q = mixer.q(x).flatten(1, 2).chunk(mixer.num_heads, dim=-1)
    k, v = (each.chunk(mixer.num_heads, dim=-1) for each in mixer.sr_kv(smaller).chunk(2, dim=-1))
    for queries, keys, values in zip(q, k, v, strict=True):
        scores = torch.einsum("bid,bjd->bij", queries, keys) / (dim // mixer.num_heads) ** 0.5
        out.append(scores.softmax(dim=-1) @ values)
    return mixer.proj(torch.cat(out, dim=-1)).reshape(batch, height, width, dim)


@pytest.mark.parametrize("options", [{}, {"sr_ratio": 3, "qkv_bias": False}, {"sr_ratio": 1}])
@pytest.mark.parametrize("grid", [(4, 6), (1, 1), (7, 3), (2, 9)])
def test_spatial_reduction_equals_definition(grid, options):
    mixer = spatial_reduction(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_cells_beyond_the_last_whole_square_make_no_keys():
    mixer, x = spatial_reduction(sr_ratio=2).double(), torch.randn(1, 5, 4, 12, dtype=torch.float64)
    with torch.no_grad():
        before = mixer(x)
        x[:, 4] += 1
        assert torch.equal(mixer(x)[:, :4], before[:, :4])
        assert not torch.allclose(mixer(x)[:, 4], before[:, 4])


def test_a_batch_norm_folds_into_the_convolution_before_it():
    mixer = spatial_reduction(norm_layer=RepBN).double().eval()
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = mixer(x)
        mixer.reparameterize()
        assert type(mixer.norm) is torch.nn.Identity
        assert torch.allclose(mixer(x), expected, atol=1e-12)


def test_spatial_reduction_refuses_heads_and_ratios_that_do_not_fit():
    with pytest.raises(ValueError, match="sr_ratio=0 is too small; give 1 or more"):
        create_mixer("spatial_reduction", 12, sr_ratio=0)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("spatial_reduction", 12, num_heads=5)

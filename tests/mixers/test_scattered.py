"""Scattered linear attention against its definition, window by window."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer

from visionmix import create_mixer

scattered = partial(drawn_mixer, "scattered", num_heads=3, window_size=3)


def defined(mixer, x, windows=None):
    """The definition: every token weighs every token of its window."""
    _, height, width, _ = x.shape
    if windows is None:
        side = mixer.window_size
        windows = torch.tensor([(cell // width // side, cell % width // side) for cell in range(height * width)])
        windows = windows[:, 0] * (width + 1) + windows[:, 1]
    q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, mixer.num_heads, -1)).unbind(2)
    q, k, out = q.relu(), k.relu(), torch.empty_like(v)
    for i, window in enumerate(windows):
        inside = windows == window
        weights = torch.einsum("bhc,bnhc->bnh", q[:, i], k[:, inside])
        out[:, i] = torch.einsum("bnh,bnhc->bhc", weights, v[:, inside]) / (weights.sum(1)[..., None] + 1e-6)
    return mixer.proj(out.flatten(2)).reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"window_size": 1}, {"window_size": 9, "qkv_bias": True}])
@pytest.mark.parametrize("grid", [(7, 5), (1, 1), (3, 6)])
def test_scattered_equals_definition(grid, options):
    mixer = scattered(**options).double()
    check_definition(mixer, defined, (2, *grid, 12), rtol=1e-7)


def test_tokens_lie_anywhere():
    """Windows need not be in order, nor of one size, nor numbered without gaps."""
    mixer = scattered().double()
    x = torch.randn(2, 1, 11, 12, dtype=torch.float64)
    windows = torch.tensor([5, 0, 5, 9, 0, 5, 5, 0, 0, 5, 5])
    with torch.no_grad():
        assert torch.allclose(mixer.forward_windows(x[:, 0], windows), defined(mixer, x, windows)[:, 0], atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast):
    check_half_precision(
        scattered(window_size=20, num_heads=1), 10 * torch.randn(1, 24, 24, 12), defined, dtype, autocast
    )


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("scattered", 12, num_heads=5)
    with pytest.raises(ValueError, match="window_size=0 is too small"):
        create_mixer("scattered", 12, window_size=0)

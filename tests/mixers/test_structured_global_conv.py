"""Structured global convolution against its definition, tap by tap."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

global_conv = partial(drawn_mixer, "structured_global_conv", grid_size=(4, 4), kernel_dim=4)


def stretched(piece, factor):
    """The definition: numbers at the middles of their stretches, straight lines in between, flat at the ends."""
    places = ((torch.arange(len(piece) * factor) + 0.5) / factor - 0.5).clamp(0, len(piece) - 1)
    low = places.floor().long()
    return piece[low] + (places - low) * (piece[(low + 1).clamp(max=len(piece) - 1)] - piece[low])


def taps(mixer, kernel, channel, dim):
    """The definition: the pieces of one kernel of one channel, end to end or one on top of the other."""
    n = mixer.scales
    decay = mixer.decay_min + (mixer.decay_max - mixer.decay_min) * channel / max(1, dim - 1)
    parts = []
    for i in range(n):
        factor = 2 ** max(0, i - 1) if mixer.concatenated else 2**i
        parts.append(stretched(mixer.pieces[i, kernel, channel], factor) * decay ** (n - 1 - i))
    if mixer.concatenated:
        whole = torch.cat(parts)
    else:
        whole = sum(F.pad(part, (0, len(parts[-1]) - len(part))) for part in parts)
    return whole / mixer.kernel_norm[kernel, channel, 0]


def defined(mixer, x):
    _, height, width, dim = x.shape
    tokens, count = x.flatten(1, 2), height * width
    kernels, outs = len(mixer.D), []
    for number in range(kernels):
        for channel in range(dim):
            before = F.pad(taps(mixer, number, channel, dim), (0, count))
            signal, rows = tokens[..., channel], []
            if mixer.bidirectional:
                behind = F.pad(taps(mixer, kernels + number, channel, dim), (0, count))
            for t in range(count):
                y = sum(before[t - j] * signal[:, j] for j in range(t + 1)) + mixer.D[number, channel] * signal[:, t]
                if mixer.bidirectional:
                    y = y + sum(behind[j - t - 1] * signal[:, j] for j in range(t + 1, count))
                rows.append(y)
            outs.append(torch.stack(rows, dim=1))
    return mixer.proj(F.gelu(torch.stack(outs, dim=-1))).reshape(x.shape)


@pytest.mark.parametrize("mode", ["cat", "sum"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"channels": 2, "decay_min": 1.0, "decay_max": 3.0}])
@pytest.mark.parametrize("grid", [(3, 2), (1, 1), (5, 4)])  # 20 tokens are more than the kernel's 16
def test_global_conv_equals_definition(grid, options, mode):
    mixer = global_conv(mode=mode, **options).double()
    mixer.set_kernel_norm()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-7)  # its decays are of float32


def test_the_kernel_norm_is_that_of_the_drawn_pieces():
    mixer = create_mixer("structured_global_conv", 12, kernel_dim=4, grid_size=(4, 4))
    assert torch.allclose(mixer.kernel(16).norm(dim=-1), torch.ones(2, 12))
    before = mixer(x := torch.randn(1, 4, 4, 12))
    with torch.no_grad():
        mixer.pieces.mul_(2)
    assert not torch.allclose(mixer(x), before)  # training moves the kernel and not what divides it


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast):
    mixer = global_conv()
    mixer.set_kernel_norm()
    check_half_precision(mixer, 10 * torch.randn(1, 4, 5, 12), defined, dtype, autocast)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode='mean' is unknown; give one of 'cat', 'sum'"),
        ({"kernel_dim": 0}, "kernel_dim=0 is too small"),
        ({"channels": 0}, "channels=0 is too small"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("structured_global_conv", 12, **options)

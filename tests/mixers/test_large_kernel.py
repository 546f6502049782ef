"""Large kernel attention against its definition, tap by tap."""

from functools import partial

import pytest
import torch
from drawn import check_definition, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

lka = partial(drawn_mixer, "lka")


def swept(x, conv, step):
    """Return the sum over the taps of a depthwise convolution, `step` cells apart, of x (batch, height, width, dim)."""
    _, height, width, _ = x.shape
    taps = conv.weight.shape[-1]
    out = torch.zeros_like(x) + conv.bias
    for row in range(height):
        for column in range(width):
            for tap in range(taps * taps):
                at = row + step * (tap // taps - taps // 2), column + step * (tap % taps - taps // 2)
                if 0 <= at[0] < height and 0 <= at[1] < width:
                    out[:, row, column] = (
                        out[:, row, column] + conv.weight[:, 0, tap // taps, tap % taps] * x[:, at[0], at[1]]
                    )
    return out


def defined(mixer, x, dilation):
    u = F.gelu(F.linear(x, mixer.proj_in.weight, mixer.proj_in.bias))
    far = swept(swept(u, mixer.conv, 1), mixer.dilated, dilation)
    gate = F.linear(far, mixer.gate.weight, mixer.gate.bias)
    return F.linear(u * gate, mixer.proj.weight, mixer.proj.bias) + x


@pytest.mark.parametrize(
    ("options", "sizes", "grid"),
    [({}, (5, 7), (7, 5)), ({"kernel_size": 5, "dilation": 2}, (3, 3), (1, 6)), ({"dilation": 1}, (1, 21), (3, 2))],
)
def test_lka_equals_definition(options, sizes, grid):
    mixer = lka(**options).double()
    assert (mixer.conv.kernel_size[0], mixer.dilated.kernel_size[0]) == sizes
    check_definition(mixer, lambda mixer, x: defined(mixer, x, options.get("dilation", 3)), (2, *grid, 12))


def test_float16_carries_gated_products_beyond_its_range():
    mixer = lka()
    with torch.no_grad():
        mixer.proj_in.bias += 300.0
        mixer.gate.bias += 400.0  # 300 * 400 is beyond float16
        mixer.proj.weight *= 1e-2
    x = torch.randn(1, 4, 5, 12)
    with torch.no_grad():
        out = mixer.half()(x.half())
        expected = mixer.double()(x.half().double())
    assert (out.double() - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 12}, "kernel_size=12 needs 4 taps at dilation=3"),
        ({"kernel_size": 0}, "kernel_size=0 needs 0 taps"),
        ({"dilation": 0}, "dilation=0 is no distance"),
    ],
)
def test_lka_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("lka", 12, **options)

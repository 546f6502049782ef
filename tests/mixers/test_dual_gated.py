"""Dual-gated linear attention against its definition, cell by cell."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from naive_linear_attention import convolved, turned_attention
from torch.nn import functional as F

from visionmix import create_mixer

dual_gated = partial(drawn_mixer, "dual_gated", num_heads=3)


def defined(mixer, x):
    _, height, width, _ = x.shape
    v = mixer.value_up(F.silu(mixer.value_down(x)))
    out = [
        turned_attention(F.elu(mixer.qk(image)) + 1, values, mixer.num_heads, height, width)
        for image, values in zip(x.flatten(1, 2), v.flatten(1, 2), strict=True)
    ]
    return mixer.proj((torch.stack(out).reshape(x.shape) + convolved(v, mixer.lepe)) * F.silu(mixer.gate(x)))


@pytest.mark.parametrize("options", [{}, {"num_heads": 1, "reduction": 3, "qk_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_dual_gated_equals_definition(options, grid):
    mixer = dual_gated(**options).double()
    check_definition(mixer, defined, (2, *grid, 12))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_sums_of_many_large_keys(dtype, autocast):
    mixer = dual_gated()
    with torch.no_grad():
        mixer.qk.bias[12:16] = 200.0  # of one head's keys: 400 of them sum to more than float16 has
    check_half_precision(mixer, torch.randn(1, 20, 20, 12), defined, dtype, autocast)


def test_the_bottleneck_of_the_values_is_a_quarter_wide():
    assert create_mixer("dual_gated", 12).value_down.weight.shape == (3, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ({"num_heads": 4}, "num_heads=4 make heads of 3 channels"),
        ({"reduction": 13}, "reduction=13 leaves no channels of dim=12"),
        ({"reduction": 0}, "reduction=0 leaves no channels"),
    ],
)
def test_dual_gated_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("dual_gated", 12, **options)

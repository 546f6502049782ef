"""Groups of channels mixed apart, against their definition."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from naive_linear_attention import attended, convolved
from torch.nn import functional as F

from visionmix import create_mixer

decoupled = partial(drawn_mixer, "decoupled", std=0.5)


def defined(mixer, x):
    """The definition for 12 channels: every query weighs every key by itself, every strip is its own convolution."""
    memory, a, b, c = x.split(3, dim=-1)
    if mixer.attends:
        q, k = (F.elu(each) + 1 for each in F.linear(a, mixer.qk.weight, mixer.qk.bias).chunk(2, dim=-1))
        cells = a.shape[1] * a.shape[2]
        mixed = attended(q, k, a, mixer.heads, epsilon=1e-6 * cells).reshape(a.shape)
    else:
        mixed = sum(
            F.conv2d(a.permute(0, 3, 1, 2), conv.weight, conv.bias, padding="same", groups=3).permute(0, 2, 3, 1)
            for conv in (mixer.column_conv, mixer.row_conv)
        )
    return torch.cat([memory, mixed, convolved(b, mixer.near_conv), convolved(c, mixer.far_conv)], dim=-1)


@pytest.mark.parametrize("options", [{}, {"num_heads": 3}, {"strips": 11}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3), (1, 14)])
def test_decoupled_equals_definition(grid, options):
    mixer = decoupled(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_strips_cross():
    mixer, x = decoupled(strips=5), torch.zeros(1, 9, 9, 12)
    with torch.no_grad():
        before = mixer(x)
        x[0, 4, 4, 3:6] = 1
        changed = (mixer(x) != before).any(dim=-1)[0]
    assert changed.sum() == 9
    assert changed[2:7, 4].all()
    assert changed[4, 2:7].all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_large_keys(dtype, autocast):
    mixer = decoupled()
    with torch.no_grad():
        mixer.qk.bias[:3] = 200.0
        mixer.qk.bias[3:] = torch.tensor([300.0, -12.0, 0.0])
    x = 10 * torch.randn(1, 40, 40, 12)
    check_half_precision(mixer, x, defined, dtype, autocast)


@pytest.mark.parametrize(("dim", "groups"), [(4, [1, 1, 1, 1]), (7, [4, 1, 1, 1]), (32, [8, 8, 8, 8])])
def test_three_groups_take_a_quarter_each(dim, groups):
    mixer, x = create_mixer("decoupled", dim), torch.randn(1, 3, 4, dim)
    assert mixer.groups == groups
    assert torch.equal(mixer(x)[..., : groups[0]], x[..., : groups[0]])


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (12, {"num_heads": 2}, "num_heads=2 does not divide the 3 channels"),
        (12, {"strips": 4}, "strips=4 is even"),
        (3, {}, "dim=3 is too small"),
    ],
)
def test_decoupled_refuses_options_that_do_not_fit(dim, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("decoupled", dim, **options)

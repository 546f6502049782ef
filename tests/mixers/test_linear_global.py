"""Linear global attention against its definition, query by query."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

linear_global = partial(drawn_mixer, "linear_global", num_heads=3)


def defined(mixer, x):
    """The definition: every query weighs every key by itself."""
    q, k, v = F.linear(x.flatten(1, 2), mixer.qkv.weight, mixer.qkv.bias).chunk(3, dim=-1)
    heads = []
    for head, channels in enumerate(torch.arange(x.shape[-1]).chunk(mixer.num_heads)):
        weights = q[..., channels].relu() @ k[..., channels].relu().transpose(1, 2)
        normaliser = weights.sum(dim=-1, keepdim=True)
        normaliser = torch.where(normaliser < mixer.floor, mixer.floor, normaliser)
        heads.append(mixer.head_scale[head] * (weights / normaliser) @ v[..., channels])
    return mixer.proj(torch.cat(heads, dim=-1)).reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"floor": 0.5}, {"floor": 4, "num_heads": 1, "qkv_bias": False}])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (7, 3)])
def test_linear_global_equals_definition(options, grid):
    mixer = linear_global(**options).double()
    check_definition(mixer, defined, (2, *grid, 12))


def test_some_normalisers_here_are_clamped_and_some_are_not():
    mixer = linear_global(floor=4).double()
    q, k, _ = mixer.qkv(torch.randn(1, 4, 5, 12, dtype=torch.float64).flatten(1, 2)).relu().chunk(3, dim=-1)
    normalisers = (q * k.sum(dim=1, keepdim=True)).unflatten(-1, (3, -1)).sum(dim=-1)
    assert (normalisers < 4).any()
    assert (normalisers > 4).any()


def test_queries_and_keys_that_see_nothing_give_the_bias_and_finite_gradients():
    mixer = linear_global()
    with torch.no_grad():
        mixer.qkv.weight[:24] = 0
        mixer.qkv.bias[:24] = -1
    x = torch.randn(1, 3, 4, 12, requires_grad=True)
    out = mixer(x)
    assert torch.allclose(out, mixer.proj.bias.expand_as(out))
    out.square().sum().backward()
    assert all(value.grad.isfinite().all() for value in (x, *mixer.parameters()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_sums_of_many_large_keys(dtype, autocast):
    mixer = linear_global()
    with torch.no_grad():
        mixer.qkv.bias[:8] = 30.0  # of two heads' queries
        mixer.qkv.bias[12:16] = 50.0  # of one head's keys: 1600 of them times 50 are beyond float16
    check_half_precision(mixer, torch.randn(1, 40, 40, 12), defined, dtype, autocast)


def test_linear_global_takes_sequences_and_begins_with_the_scale_of_softmax():
    mixer = create_mixer("linear_global", 12, num_heads=3)
    assert not mixer.needs_map
    assert (mixer.head_scale == 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_heads": 5}, "num_heads=5 does not divide dim=12"), ({"floor": 0}, "floor=0 lets normalisers be 0")],
)
def test_linear_global_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("linear_global", 12, **options)

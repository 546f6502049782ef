"""LightNet's attention against its definition, token by token."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.scans import order

lightnet = partial(drawn_mixer, "lightnet", num_heads=3)


def defined(mixer, x):
    tokens = x.flatten(1, 2)
    if mixer.causal:
        index, inverse = order(mixer.order, x.shape[1], x.shape[2])
        tokens = tokens[:, index]
    q, k, v = (each.unflatten(-1, (mixer.num_heads, -1)) for each in mixer.qkv(tokens).split(mixer.parts, dim=-1))
    rows = []
    for t in range(tokens.shape[1]):
        seen = slice(t + 1) if mixer.causal else slice(None)
        shares = k[:, seen].exp() / k[:, seen].exp().sum(1, keepdim=True)
        state = torch.einsum("bnhk,bnhv->bhkv", shares, v[:, seen])
        rows.append(torch.einsum("bhk,bhkv->bhv", F.silu(q[:, t]), state) * q.shape[-1] ** -0.5)
    y = torch.stack(rows, dim=1).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight
    out = mixer.proj(y * F.silu(mixer.gate_up(mixer.gate_down(tokens))))
    return (out[:, inverse] if mixer.causal else out).reshape(x.shape)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"key_ratio": 0.5}, {"causal": True}, {"causal": True, "order": "hilbert", "key_ratio": 2}]
)
def test_lightnet_equals_definition(options, grid):
    mixer = lightnet(**options).double()
    check_definition(mixer, defined, (2, *grid, 12), rtol=1e-7)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, causal, autocast):
    check_half_precision(lightnet(causal=causal), 10 * torch.randn(1, 12, 12, 12), defined, dtype, autocast)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ({"num_heads": 4, "key_ratio": 0.5}, r"num_heads=4 does not divide dim=12 and the key width 6"),
        ({"gate_rank": 0}, "gate_rank=0 is too small"),
        ({"order": "msvmamba_lowres"}, "reads cells more than once"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("lightnet", 12, **options)

"""The delta rule's mixer against its recurrence, token by token."""

from functools import partial

import pytest
import torch
from delta_recurrence import recurrence
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.scans import order

delta_rule = partial(drawn_mixer, "gated_delta_rule", num_heads=3)


def defined(mixer, x):
    tokens = x.flatten(1, 2)
    index, inverse = order(mixer.order, x.shape[1], x.shape[2])
    read = tokens[:, index]
    q, k, v = mixer.qkv(read).unflatten(-1, (3, mixer.num_heads, -1)).unbind(2)
    q, k = (F.silu(each) / F.silu(each).norm(dim=-1, keepdim=True) for each in (q, k))
    betas = mixer.beta(read).sigmoid().split(mixer.num_heads, dim=-1)
    decays = [torch.zeros_like(each) for each in betas]
    if mixer.has_gate:
        decays = mixer.decay(read).sigmoid().log().split(mixer.num_heads, dim=-1)
    y = recurrence(q, k, v, decays[0], betas[0], q.shape[-1] ** -0.5)
    if mixer.bidirectional:
        back = [each.flip(1) for each in (q, k, v, decays[1], betas[1])]
        y = y + recurrence(*back, q.shape[-1] ** -0.5).flip(1)
    y = y[:, inverse]
    y = y / (y.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight
    return mixer.proj(y.flatten(2) * F.silu(mixer.out_gate(tokens))).reshape(x.shape)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (9, 8)])
@pytest.mark.parametrize("options", [{}, {"gate": False, "order": "hilbert"}, {"bidirectional": False}])
def test_mixer_equals_definition(options, grid):
    mixer = delta_rule(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixer_in_half_precision(dtype, autocast):
    check_half_precision(delta_rule(), torch.randn(1, 12, 12, 12), defined, dtype, autocast)


def test_states_begin_to_live_long_and_bad_options_are_named():
    mixer = create_mixer("gated_delta_rule", 12, num_heads=3)
    halved = torch.log(torch.tensor(0.5)) / F.logsigmoid(mixer.decay.bias)
    assert halved.min() > 35
    assert halved.max() < 450
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("gated_delta_rule", 12, num_heads=5)
    with pytest.raises(ValueError, match="reads cells more than once"):
        create_mixer("gated_delta_rule", 12, order="msvmamba_lowres")

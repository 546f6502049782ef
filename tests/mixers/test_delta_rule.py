"""The delta rule and its mixer against their recurrences, token by token."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer, kernels
from visionmix.kernels.delta_rule import gated_delta_rule
from visionmix.scans import order

delta_rule = partial(drawn_mixer, "gated_delta_rule", num_heads=3)


def recurrence(q, k, v, g, beta, scale):
    """The definition: a state, which forgets, then moves its entry for the key to the value."""
    batch, length, heads, dk = q.shape
    state, outs = q.new_zeros(batch, heads, dk, v.shape[-1]), []
    for t in range(length):
        state = state * g[:, t, :, None, None].exp()
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - held))
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outs, dim=1)


def random_inputs(length, dk=5, dv=3, batch=2, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, k = (F.normalize(torch.randn(batch, length, heads, dk, generator=generator), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, dv, generator=generator)
    g = F.logsigmoid(2 + torch.randn(batch, length, heads, generator=generator))
    beta = 2 * torch.rand(batch, length, heads, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_op_equals_recurrence(length, reference):
    inputs = random_inputs(length)
    with kernels.use("reference" if reference else "auto"):
        out = gated_delta_rule(*inputs)
    expected = recurrence(*inputs, scale=5**-0.5)
    assert torch.allclose(out, expected, atol=1e-12)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad)
    for own, other in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(own, other, rtol=1e-8, atol=1e-10)


def test_op_in_half_precision_and_with_strong_decays():
    q, k, v, g, beta = random_inputs(150, dtype=torch.float32)
    g = g - torch.arange(150)[:, None] % 7 * 30.0
    out = gated_delta_rule(q, k, v, g, beta, scale=2.0)
    expected = recurrence(*(x.double() for x in (q, k, v, g, beta)), scale=2.0)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert gated_delta_rule(*(x.half() for x in (q, k, v, g, beta))).dtype == torch.float32
    torch.library.opcheck(torch.ops.visionmix.gated_delta_rule, (*(x.detach() for x in (q, k, v, g, beta)), 1.0))


def test_op_names_what_does_not_fit():
    q, k, v, g, beta = random_inputs(3)
    with pytest.raises(ValueError, match="beta"):
        gated_delta_rule(q, k, v, g, beta[:, 1:])
    with pytest.raises(TypeError, match="k"):
        gated_delta_rule(q, 3, v, g, beta)


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

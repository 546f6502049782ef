"""The gated delta rule against its recurrence, token by token."""

import pytest
import torch
from delta_recurrence import recurrence
from torch.nn import functional as F

from visionmix import kernels
from visionmix.kernels.delta_rule import gated_delta_rule


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

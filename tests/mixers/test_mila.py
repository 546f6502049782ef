"""MILA's mixer against its definition, written cell by cell."""

import pytest
import torch
from naive_linear_attention import turned_attention
from torch.nn import functional as F

from visionmix.mixers import MambaInspiredLinearAttention


def naive(mixer, x):
    _, height, width, _ = x.shape
    y, gate = mixer.in_proj(x).chunk(2, dim=-1)
    v = F.silu(mixer.conv(y.permute(0, 3, 1, 2)))
    local = mixer.lepe(v).permute(0, 2, 3, 1)
    out = []
    for values in v.permute(0, 2, 3, 1).flatten(1, 2):
        qk = F.elu(mixer.qk(values)) + 1
        out.append(turned_attention(qk, values, mixer.num_heads, height, width).unflatten(0, (height, width)))
    return mixer.proj((torch.stack(out) + local) * F.silu(gate))


@pytest.mark.parametrize(("dim", "heads", "size"), [(12, 3, (3, 5)), (16, 2, (1, 1)), (24, 3, (4, 2))])
def test_outputs_and_gradients_equal_the_definition(dim, heads, size):
    torch.manual_seed(0)
    mixer = MambaInspiredLinearAttention(dim, heads).double()
    x = torch.randn(2, *size, dim, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), naive(mixer, x)
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-12)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(out)
    grads, wanted = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for own, other in zip(grads, wanted, strict=True):
        assert torch.allclose(own, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("dim", "heads", "message"), [(12, 5, "num_heads=5"), (18, 3, "dim=18"), (12, 4, "num_heads=4")]
)
def test_widths_that_do_not_turn_are_refused(dim, heads, message):
    with pytest.raises(ValueError, match=message):
        MambaInspiredLinearAttention(dim, heads)

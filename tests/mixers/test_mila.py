"""MILA's mixer against its definition, written cell by cell."""

import math

import pytest
import torch
from torch.nn import functional as F

from visionmix.mixers import MambaInspiredLinearAttention


def turned(x, height, width):
    """Return x (tokens, dim), pairs of all its channels turned by row in the first half, by column in the second."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[1] // 2
    for cell in range(height * width):
        for pair in range(2 * count):
            angle = (cell // width if pair < count else cell % width) * 10000.0 ** -(pair % count / count)
            pairs[cell, pair] = pairs[cell, pair] * complex(math.cos(angle), math.sin(angle))
    return torch.view_as_real(pairs).flatten(1)


def naive(mixer, x):
    _, height, width, dim = x.shape
    y, gate = mixer.in_proj(x).chunk(2, dim=-1)
    v = F.silu(mixer.conv(y.permute(0, 3, 1, 2)))
    local = mixer.lepe(v).permute(0, 2, 3, 1)
    out = []
    for values in v.permute(0, 2, 3, 1).flatten(1, 2):
        q, k = (F.elu(mixer.qk(values)) + 1).chunk(2, dim=-1)
        turned_q, turned_k = turned(q.clone(), height, width), turned(k.clone(), height, width)
        heads = []
        for head in torch.arange(dim).chunk(mixer.num_heads):
            weights = turned_q[:, head] @ turned_k[:, head].T / len(values)
            normaliser = (q[:, head] @ k[:, head].T).mean(dim=1, keepdim=True) + 1e-6
            heads.append(weights @ values[:, head] / normaliser)
        out.append(torch.cat(heads, dim=1).unflatten(0, (height, width)))
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

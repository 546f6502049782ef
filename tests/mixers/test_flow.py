"""Flow-attention against its definition, token by token."""

from functools import partial

import pytest
import torch
from drawn import check_definition, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

flow = partial(drawn_mixer, "flow", num_heads=3)


def defined(mixer, x):
    """The definition: every flow is a sum over single tokens of the other side."""
    q, k, v = F.linear(x.flatten(1, 2), mixer.qkv.weight, mixer.qkv.bias).chunk(3, dim=-1)
    q, k = torch.sigmoid(q), torch.sigmoid(k)
    n, eps = q.shape[1], 1e-6
    images = []
    for image in range(len(x)):
        heads = []
        for channels in torch.arange(x.shape[-1]).chunk(mixer.num_heads):
            a, b, c = (each[image][:, channels] for each in (q, k, v))
            into = [((a[i] + eps) * (sum(b) + eps)).sum() + eps for i in range(n)]
            out_of = [((b[j] + eps) * (sum(a) + eps)).sum() + eps for j in range(n)]
            given = sum(b[j] / out_of[j] for j in range(n))
            taken = sum(a[i] / into[i] for i in range(n))
            sinks = [((a[i] + eps) * (given + eps)).sum() + eps for i in range(n)]
            sources = torch.stack([((b[j] + eps) * (taken + eps)).sum() + eps for j in range(n)]).clamp(-1, 1)
            compete = n * sources.exp() / sources.exp().sum()
            rows = [
                sum((a[i] @ b[j]) * compete[j] * c[j] for j in range(n)) / into[i] * torch.sigmoid(sinks[i])
                for i in range(n)
            ]
            heads.append(torch.stack(rows))
        images.append(torch.cat(heads, dim=-1))
    return mixer.proj(torch.stack(images)).reshape(x.shape)


@pytest.mark.parametrize(("options", "grid"), [({}, (3, 4)), ({"qkv_bias": False}, (1, 1)), ({"num_heads": 1}, (5, 1))])
def test_flow_equals_definition(options, grid):
    mixer = flow(**options).double()
    check_definition(mixer, defined, (2, *grid, 12))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_flows_of_many_tokens_and_of_almost_none(dtype, autocast):
    mixer = flow()
    with torch.no_grad():
        mixer.qkv.bias[:4] = -15.0  # of a head's queries: 3e-7 after the sigmoid
        mixer.qkv.bias[16:20] = 8.0  # of another head's keys
    x = torch.randn(1, 90, 90, 12)
    low = mixer if autocast else mixer.to(dtype)
    with torch.no_grad():
        with torch.autocast("cpu", dtype, enabled=autocast):
            out = low(x if autocast else x.to(dtype))
        expected = low.double()(x.double() if autocast else x.to(dtype).double())
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert (out.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_flow_takes_sequences_and_refuses_heads_that_do_not_fit():
    mixer = flow()
    assert not mixer.needs_map
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("flow", 12, num_heads=5)

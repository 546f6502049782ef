"""Attention between binary codes against its definition, its fit against the published loss, and what it refuses."""

from functools import partial, partialmethod

import pytest
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.mixers.kernel_hash import KernelHash

hashed = partial(drawn_mixer, "kernel_hash", num_heads=3)


def unit_vectors(batch=2, tokens=40):
    torch.manual_seed(2)
    return F.normalize(torch.randn(batch, 3, tokens, 4, dtype=torch.float64), dim=-1)


def defined(mixer, x):
    """The definition: sums over single tokens, of one image and head at a time."""
    q, v = F.linear(x.flatten(1, 2), mixer.qv.weight, mixer.qv.bias).chunk(2, dim=-1)
    images = []
    for image in range(len(x)):
        heads = []
        for head, channels in enumerate(torch.arange(x.shape[-1]).chunk(mixer.num_heads)):
            a, values = q[image][:, channels], v[image][:, channels]
            a = torch.stack([row / row.square().sum().sqrt() for row in a])
            d = torch.stack(
                [torch.stack([(row - each).square().sum() for each in mixer.hash.anchors[head]]) for row in a]
            )
            kernel = torch.exp(-d / (2 * d.mean())) - mixer.hash.offset[head]
            codes = torch.sign(torch.stack([mixer.hash.weight[head] @ row for row in kernel]))
            rows = []
            for own, code in zip(values, codes, strict=True):
                weights = [code @ other + mixer.bits + 1 for other in codes]
                if mixer.published_sum:
                    top = sum((code @ other) * value for other, value in zip(codes, values, strict=True))
                    top = top + (mixer.bits + 1) * own
                else:
                    top = sum(weight * value for weight, value in zip(weights, values, strict=True))
                rows.append(top / sum(weights))
            heads.append(torch.stack(rows))
        images.append(torch.cat(heads, dim=-1))
    return mixer.proj(torch.stack(images)).reshape(x.shape)


@pytest.mark.parametrize("published_sum", [False, True])
@pytest.mark.parametrize(("options", "grid"), [({}, (3, 4)), ({"bits": 5, "num_anchors": 7}, (1, 2)), ({}, (1, 1))])
def test_kernel_hash_equals_definition(options, grid, published_sum):
    mixer = hashed(**options, published_sum=published_sum).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_codes_pass_gradients_between_minus_one_and_one():
    torch.manual_seed(0)
    codes = KernelHash(3, 4, 16, 25).double()
    codes.weight.mul_(4)
    q = unit_vectors().requires_grad_()
    d = (q.unsqueeze(3) - codes.anchors.unsqueeze(1)).square().sum(dim=-1)
    y = (torch.exp(-d / (2 * d.mean(dim=(2, 3), keepdim=True))) - codes.offset) @ codes.weight.transpose(1, 2)
    made = codes(q)
    assert torch.equal(made, torch.sign(y))
    within = (y.abs() < 1).double()
    assert 0.1 < within.mean() < 0.9
    weights = torch.randn_like(y)
    own, expected = torch.autograd.grad((made * weights).sum(), q), torch.autograd.grad((y * within * weights).sum(), q)
    assert torch.allclose(own[0], expected[0], atol=1e-12)


def published_fit(kernel, similarities, weight, steps):
    """The published fit of (heads, bits, anchors), with whole matrices of similarities."""
    bits, tokens = weight.shape[1], kernel.shape[2]
    left, fitted = similarities * bits, []

    def loss(y):
        return -torch.einsum("bhn,bhnl,bhl->bh", y, left, y).mean() / (tokens * bits)

    def sign(row):
        return torch.where(torch.einsum("bhnm,hm->bhn", kernel, row) > 0, 1.0, -1.0).double()

    for bit in range(bits):
        row = weight[:, bit].clone().requires_grad_()
        optimiser = torch.optim.SGD([row], lr=0.0005, momentum=0.9, nesterov=True)
        for _ in range(steps):
            y = 2 / (1 + torch.exp(-torch.einsum("bhnm,hm->bhn", kernel, row))) - 1
            optimiser.zero_grad()
            loss(y).backward()
            optimiser.step()
        row = row.detach()
        fitted.append(row if loss(sign(row)) < loss(sign(weight[:, bit])) else weight[:, bit])
        y = sign(fitted[-1])
        left = left - torch.einsum("bhn,bhm->bhnm", y, y)
    return torch.stack(fitted, dim=1)


def test_fit_is_the_published():
    torch.manual_seed(0)
    codes, q = KernelHash(3, 4, 6, 25).double(), unit_vectors()
    start = codes.weight.clone()
    codes.fit(q, steps=300)
    cells = q.transpose(0, 1).flatten(1, 2)
    for head in range(3):  # anchors are vectors of q, none of them twice
        distance = torch.cdist(codes.anchors[head], cells[head])
        assert distance.amin(dim=1).max() < 1e-6
        assert len(set(distance.argmin(dim=1).tolist())) == 25
    d = (q.unsqueeze(3) - codes.anchors.unsqueeze(1)).square().sum(dim=-1)
    kernel = torch.exp(-d / (2 * d.mean(dim=(2, 3), keepdim=True)))
    mean = kernel.mean(dim=(0, 2))
    assert torch.allclose(codes.offset.squeeze(1), mean)
    attention = q @ q.transpose(-2, -1)
    similarities = torch.zeros_like(attention)
    similarities.scatter_(3, attention.topk(10).indices, 1.0)
    similarities.scatter_(3, attention.topk(10, largest=False).indices, -1.0)
    expected = published_fit(kernel - mean[:, None], similarities, start, 300)
    assert torch.allclose(codes.weight, expected, atol=1e-10)
    assert not torch.equal(codes.weight, start)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (6, 7)])
def test_calibration_serves_maps_of_few_cells(grid, monkeypatch):
    mixer = hashed()
    monkeypatch.setattr(KernelHash, "fit", partialmethod(KernelHash.fit, steps=3))
    mixer.calibrate(torch.randn(1, *grid, 12))
    assert all(value.isfinite().all() for value in mixer.hash.buffers())
    assert mixer(torch.randn(2, *grid, 12)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_turns_no_sign(dtype):
    codes, q = KernelHash(3, 4, 16, 25), unit_vectors().float()
    with torch.autocast("cpu", dtype):
        assert torch.equal(codes(q), codes(q.clone()))
        low = codes(q)
    assert torch.equal(low, codes(q))


def test_a_map_of_zeros_has_finite_results_and_gradients():
    mixer = hashed(qkv_bias=False)
    x = torch.zeros(1, 3, 3, 12, requires_grad=True)
    mixer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_bad_options_are_refused():
    for options in ({"num_heads": 5}, {"bits": 0}, {"num_anchors": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            create_mixer("kernel_hash", 12, **options)

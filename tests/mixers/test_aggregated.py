"""TransNeXt's mixers against their definitions, query by query."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.mixers.aggregated import LogSpacedPositionBias

aggregated = partial(drawn_mixer, "aggregated", num_heads=3, grid_size=(4, 6))
cosine = partial(drawn_mixer, "length_scaled_cosine", num_heads=3, grid_size=(4, 6))


def position_bias(bias, query, key, sides):
    """The bias (heads,) of a query and a key at places (row, column)."""
    distance = torch.tensor([8 * (q - k) / (side - 1) for q, k, side in zip(query, key, sides, strict=True)])
    spaced = distance.sign() * (distance.abs() + 1).log2() / 3
    return bias.fc2(bias.fc1(spaced.to(bias.fc1.weight.dtype)).relu())


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def windows(length, bins):
    """Adaptive pooling's windows."""
    return [range(k * length // bins, -(-(k + 1) * length // bins)) for k in range(bins)]


def pooled_map(mixer, x, ratio):
    """The pooled cells (batch, cells, dim) and the middles of their windows."""
    rows, columns = (windows(side, max(side // ratio, 1)) for side in x.shape[1:3])
    y = F.gelu(mixer.pool_proj(x))
    cells = [y[:, r.start : r.stop, c.start : c.stop].mean((1, 2)) for r in rows for c in columns]
    middles = [((r.start + r.stop - 1) / 2, (c.start + c.stop - 1) / 2) for r in rows for c in columns]
    return F.layer_norm(torch.stack(cells, 1), (x.shape[3],), mixer.pool_norm.weight, mixer.pool_norm.bias), middles


def heads_of(x):
    return x.unflatten(-1, (3, -1))


def defined_aggregated(mixer, x, ratio, sides=(4, 6)):
    _, height, width, _ = x.shape
    pooled, middles = pooled_map(mixer, x, ratio)
    k, v = (heads_of(each) for each in mixer.key_value(x).chunk(2, -1))
    pooled_k, pooled_v = (heads_of(each) for each in mixer.key_value(pooled).chunk(2, -1))
    q = unit(heads_of(mixer.query(x)))
    rows = []
    for i in range(height):
        for j in range(width):
            near = [(n, i + n // 3 - 1, j + n % 3 - 1) for n in range(9)]
            near = [(n, r, c) for n, r, c in near if 0 <= r < height and 0 <= c < width]
            count = torch.tensor(float(len(near) + len(middles))).log()
            query = (q[:, i, j] + mixer.query_embedding) * F.softplus(mixer.temperature) * count
            scores = [(query * unit(k[:, r, c])).sum(-1) + mixer.local_bias[:, n] for n, r, c in near]
            biases = [position_bias(mixer.position_bias, (i, j), middle, sides) for middle in middles]
            scores += [(query * unit(pooled_k[:, m])).sum(-1) + bias for m, bias in enumerate(biases)]
            weights = torch.stack(scores, -1).softmax(-1)
            out = (weights[..., len(near) :, None] * pooled_v.transpose(1, 2)).sum(2)
            for place, (n, r, c) in enumerate(near):
                added = (q[:, i, j] * mixer.local_tokens[:, :, n]).sum(-1) + mixer.local_weights[:, n]
                out = out + (weights[..., place] + added)[..., None] * v[:, r, c]
            rows.append(out.flatten(1))
    return mixer.proj(torch.stack(rows, 1)).view_as(x)


def defined_cosine(mixer, x, sides=(4, 6)):
    _, height, width, _ = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    q, k, v = (heads_of(each.flatten(1, 2)) for each in mixer.qkv(x).chunk(3, -1))
    length = torch.tensor(float(len(places)), dtype=x.dtype).log()
    q = (unit(q) + mixer.query_embedding) * F.softplus(mixer.temperature) * length
    biases = [[position_bias(mixer.position_bias, a, b, sides) for b in places] for a in places]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, unit(k)) + torch.stack([torch.stack(row) for row in biases]).movedim(
        2, 0
    )
    return mixer.proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)).view_as(x)


@pytest.mark.parametrize(("grid", "ratio"), [((4, 6), 2), ((5, 7), 2), ((1, 1), 4), ((3, 5), 4)], ids=str)
def test_aggregated_equals_definition(grid, ratio):
    mixer = aggregated(pool_ratio=ratio).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), defined_aggregated(mixer, x, ratio)
    # The logarithms of counts are of float32.
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-7)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(each, leaves, grad) for each in (out, expected)), strict=True)
    assert all(torch.allclose(own, other, rtol=1e-5, atol=1e-6) for own, other in pairs)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1), (1, 3)])
def test_cosine_equals_definition(grid, qkv_bias):
    mixer = cosine(qkv_bias=qkv_bias).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined_cosine(mixer, x), atol=1e-10)


@pytest.mark.parametrize(("length", "bins"), [(8, 2), (7, 3), (5, 5), (9, 4), (1, 1)])
def test_position_bias_knows_the_middles_of_all_windows(length, bins):
    torch.manual_seed(0)
    bias = LogSpacedPositionBias(2, (7, 9)).double()
    found = bias(length, 3, bins, 1, torch.zeros((), dtype=torch.float64)).unflatten(0, (length, 3))
    middles = [(window.start + window.stop - 1) / 2 for window in windows(length, bins)]
    for i in range(length):
        expected = [position_bias(bias, (i, 2), (middle, 1), (7, 9)) for middle in middles]
        assert torch.allclose(found[i, 2], torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [aggregated, cosine])
def test_half_precision_of_vectors_of_any_length(make, dtype, autocast):
    mixer, x = make(std=0.5), torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        expected = mixer(x)
        (mixer.query if hasattr(mixer, "query") else mixer.qkv).weight[:4].zero_()  # queries of one head may be zeros
    low = mixer if autocast else mixer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = low(x if autocast else x.to(dtype))
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert all(value.grad.isfinite().all() for value in low.parameters())
    assert out.shape == expected.shape


@pytest.mark.parametrize("name", ["aggregated", "length_scaled_cosine"])
def test_mixers_begin_at_the_published_temperature(name):
    mixer = create_mixer(name, 12)
    assert torch.allclose(F.softplus(mixer.temperature), torch.tensor(1 / 0.24))
    if name == "aggregated":
        assert not mixer.local_weights.any()
        assert mixer.local_bias.abs().max() < 0.003


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aggregated", {"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ("aggregated", {"pool_ratio": 0}, "pool_ratio=0 is too small"),
        ("length_scaled_cosine", {"num_heads": 5}, "num_heads=5 does not divide dim=12"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 12, **options)

"""Linear attention with each of its feature maps, and LinFusion's, against their definitions."""

import math
from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.mixers.feature_maps import FEATURE_MAPS

linear = partial(drawn_mixer, "linear", num_heads=3)
generalized = partial(drawn_mixer, "generalized_linear", num_heads=3)


def weight(layer, q, k, i, j, head, heads, count):
    """The definition: what the query of token i gives the key of token j."""
    name, dim = type(layer).__name__, len(q)
    if name == "CosFormer":
        return q.relu() @ k.relu() * math.cos(math.pi / 2 * (i - j) / count)
    if name == "Taylor":
        score = q @ k / dim**0.5
        return 1 + score + score**2 / 2
    if name == "Hedgehog":
        q, k = (layer.weight[h] @ x + layer.bias[h] for h, x in ((head, q), (heads + head, k)))
        return q.softmax(0) @ k.softmax(0) + (-q).softmax(0) @ (-k).softmax(0)
    one = {
        "Elu": lambda x: F.elu(x) + 1,
        "Relu": F.relu,
        "SquaredRelu": lambda x: F.relu(x) ** 2,
        "Softplus": F.softplus,
    }[name]
    return one(q) @ one(k)


def favor(layer, x):
    """The definition of Performer's logarithms, of one head's queries or keys (tokens, head_dim)."""
    u = x / x.shape[-1] ** 0.25
    return torch.stack([u @ w for w in layer.projection], dim=-1) - u.square().sum(-1, keepdim=True) / 2


def defined(mixer, x):
    heads, count, images = mixer.num_heads, x.shape[1] * x.shape[2], []
    for image in mixer.qkv(x.flatten(1, 2)):
        q, k, v = image.unflatten(-1, (3, heads, -1)).unbind(1)
        parts = []
        for head in range(heads):
            a, b, c = q[:, head], k[:, head], v[:, head]
            name, features = type(mixer.feature_map).__name__, 1
            if name in ("Exp", "Performer"):
                if name == "Performer":
                    a, b = favor(mixer.feature_map, a), favor(mixer.feature_map, b)
                    features = a.shape[1]
                small = 1e-4 if name == "Performer" else 0
                shifts = a.detach().amax(-1, keepdim=True), b.detach().amax()
                a, b = (a - shifts[0]).exp() + small, (b - shifts[1]).exp() + small
                weights = a @ b.T / features
            else:
                rows = range(count)
                pairs = [[weight(mixer.feature_map, a[i], b[j], i, j, head, heads, count) for j in rows] for i in rows]
                weights = torch.stack([torch.stack(row) for row in pairs])
            parts.append(weights @ c / (weights.sum(1, keepdim=True) + 1e-6 * count))
        images.append(torch.cat(parts, dim=-1))
    return mixer.proj(torch.stack(images)).reshape(x.shape)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 1)])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_linear_equals_definition(name, grid):
    mixer = linear(feature_map=name, std=0.7).double()
    check_definition(mixer, defined, (2, *grid, 12), atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if name not in ("elu", "softplus")])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast, name):
    mixer, x = linear(feature_map=name, std=0.2, num_heads=1), torch.randn(1, 24, 24, 12)
    low = mixer if autocast else mixer.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = low(x if autocast else x.to(dtype))
    out.float().square().mean().backward()
    assert all(value.grad.isfinite().all() for value in low.parameters())
    with torch.no_grad():
        expected = low.double()(x.double() if autocast else x.to(dtype).double())
    assert (out.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_performers_features_estimate_a_softmax():
    torch.manual_seed(0)
    layer = FEATURE_MAPS["performer"](1, 64, dtype=torch.float64)
    blocks = layer.projection[:64]
    products = blocks @ blocks.T
    assert torch.allclose(products, products.diag().diag(), atol=1e-10)  # orthogonal
    assert (blocks.norm(dim=1) - 8).abs().max() < 3  # as long as normal vectors are
    x = 0.5 * torch.randn(1, 50, 2, 64, dtype=torch.float64)
    q, k = layer(x).unbind(2)
    weights = q[0] @ k[0].T
    scores = (x[0, :, 0] @ x[0, :, 1].T / 8).softmax(-1)
    assert F.cosine_similarity((weights / weights.sum(-1, keepdim=True)).flatten(), scores.flatten(), dim=0) > 0.9


def test_hedgehog_begins_with_the_identity_and_learns():
    mixer = create_mixer("linear", 12, num_heads=3, feature_map="hedgehog")
    assert torch.equal(mixer.feature_map.weight, torch.eye(4).expand(6, 4, 4))
    mixer(torch.randn(1, 3, 4, 12)).sum().backward()
    assert mixer.feature_map.weight.grad.abs().sum(dim=(1, 2)).min() > 0


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="feature_map='softmax' is unknown; give one of"):
        create_mixer("linear", 12, feature_map="softmax")
    with pytest.raises(ValueError, match="feature_map='taylor' makes features that are no channels"):
        create_mixer("linear", 12, feature_map="taylor", rotary=True)
    with pytest.raises(ValueError, match="hidden_dim=0 is too small"):
        create_mixer("generalized_linear", 12, hidden_dim=0)


def prepared(layers, x):
    first, norm, _, second = layers
    y = F.linear(x, first.weight, first.bias)
    y = (y - y.mean(-1, keepdim=True)) / (
        y.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt() * norm.weight + norm.bias
    return x + F.linear(torch.where(y > 0, y, 0.01 * y), second.weight, second.bias)


def defined_generalized(mixer, x):
    tokens = x.flatten(1, 2)
    q, k, v = mixer.q(prepared(mixer.prepare_q, tokens)), mixer.k(prepared(mixer.prepare_k, tokens)), mixer.v(tokens)
    q, k, v = (each.unflatten(-1, (mixer.num_heads, -1)) for each in (F.elu(q) + 1, F.elu(k) + 1, v))
    weights = torch.einsum("bihc,bjhc->bijh", q, k)
    y = torch.einsum("bijh,bjhc->bihc", weights, v) / (weights.sum(2)[..., None] + 1e-4 * v.shape[1])
    return mixer.proj(y.flatten(2)).reshape(x.shape)


@pytest.mark.parametrize("options", [{}, {"hidden_dim": 5, "qkv_bias": True}])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1)])
def test_generalized_linear_equals_definition(grid, options):
    mixer = generalized(**options).double()
    check_definition(mixer, defined_generalized, (2, *grid, 12), rtol=1e-7)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generalized_linear_in_half_precision(dtype, autocast):
    check_half_precision(generalized(), 10 * torch.randn(1, 24, 24, 12), defined_generalized, dtype, autocast)

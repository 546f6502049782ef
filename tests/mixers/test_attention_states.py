"""MASS and LASS against their definitions, query by query."""

import math

import pytest
import torch
from drawn import check_half_precision
from torch.nn import functional as F

from visionmix import create_mixer, kernels
from visionmix.mixers.attention_states import PairBias

GRIDS = [(6, 10), (3, 4), (1, 7), (1, 1)]


def build(name, **options):
    dim, heads = (16, 1) if name == "mass" else (12, 3)
    torch.manual_seed(0)
    mixer = create_mixer(name, dim, num_heads=heads, kernel_size=3, grid_size=(2, 3), **options).eval()
    for value in mixer.parameters():
        torch.nn.init.normal_(value, std=0.3)
    for value in mixer.buffers():
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return mixer


def image(name, grid):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, *grid, 16 if name == "mass" else 12, generator=generator, dtype=torch.float64)


def turned(x):
    """x (batch, height, width, heads, head_dim), its pairs turned by row and column."""
    count = x.shape[-1] // 4
    frequencies = [10000 ** -(i / (count - 1) if count > 1 else 0) for i in range(count)]
    out = torch.empty_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for pair in range(2 * count):
                angle = (i if pair < count else j) * frequencies[pair % count]
                a, b = x[:, i, j, :, 2 * pair], x[:, i, j, :, 2 * pair + 1]
                out[:, i, j, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[:, i, j, :, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def window(place, size, dilation):
    """The three keys along an axis that a query sees; those from `size` on are padding."""
    size = max(size, 3 * dilation)
    own = [other for other in range(size) if other % dilation == place % dilation]
    start = min(max(own.index(place) - 1, 0), len(own) - 3)
    return own[start : start + 3]


def weights(q, k, bias, dilation):
    """For every query the keys of its window, as places, and their weights (batch, heads, 9)."""
    _, height, width, _, dim = q.shape
    found = {}
    for i in range(height):
        for j in range(width):
            places = [(a, b) for a in window(i, height, dilation[0]) for b in window(j, width, dilation[1])]
            scores = []
            for a, b in places:
                key = k[:, a, b] if a < height and b < width else torch.zeros_like(k[:, 0, 0])
                offset = (a - i) // dilation[0] + 2, (b - j) // dilation[1] + 2
                scores.append((q[:, i, j] * key).sum(-1) * dim**-0.5 + bias[:, offset[0], offset[1]])
            found[i, j] = places, torch.stack(scores, -1).softmax(-1)
    return found


def gathered(found, v):
    _, height, width, _, _ = v.shape
    out = torch.zeros_like(v)
    for (i, j), (places, weight) in found.items():
        for number, (a, b) in enumerate(places):
            if a < height and b < width:
                out[:, i, j] += weight[..., number, None] * v[:, a, b]
    return out


def attention_to_all(mixer, q, k, v):
    q, k, v = (each.flatten(1, 2).transpose(1, 2) for each in (q, k, v))
    tokens = v.shape[2]
    bias = mixer.pair_bias.bias_table
    if tokens != bias.shape[1]:
        bias = F.interpolate(bias[None], size=(tokens, tokens), mode="bicubic", align_corners=False)[0]
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def convolved(conv, x):
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def batch_normed(norm, x):
    return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def layer_normed(norm, x):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def projected(mixer, x, heads):
    q, k, v = (each.unflatten(-1, (heads, -1)) for each in mixer.qkv(x).chunk(3, -1))
    return turned(q), turned(k), v, convolved(mixer.lepe, v.flatten(3))


def states(scan, x):
    """The states of one scan in reading order, and C (batch, height, width, 1)."""
    sequence = x.flatten(1, 2)
    steps, B, C = scan.x_proj(sequence).split([scan.delta_weight.shape[2], 1, 1], -1)
    delta = F.softplus(steps @ scan.delta_weight[0].t() + scan.delta_bias[0])
    state, found = torch.zeros_like(sequence[:, 0]), []
    for t in range(sequence.shape[1]):
        state = (-delta[:, t] * scan.A_log[0, :, 0].exp()).exp() * state + delta[:, t] * B[:, t] * sequence[:, t]
        found.append(state)
    return torch.stack(found, 1).view_as(x), C.unflatten(1, x.shape[1:3])


def defined_mass(mixer, x):
    heads = mixer.num_heads
    gate = F.silu(batch_normed(mixer.gate_norm.bn, mixer.gate(x)))
    q, k, v, position = projected(mixer, x, heads)
    (q1, q2), (k1, k2), (v1, v2) = (each.chunk(2, 3) for each in (q, k, v))
    near = weights(q1, k1, mixer.position_bias, (1, 1))
    far = weights(q2, k2, mixer.position_bias, [max(1, min(side // 3, 3)) for side in x.shape[1:3]])
    v1 = gathered(near, v1)
    y = torch.cat([v1, gathered(far, v2 + v1)], 3)
    if mixer.global_attention:
        y = attention_to_all(mixer, q, k, y).transpose(1, 2).reshape(x.shape)
    else:
        u = F.silu(convolved(mixer.conv, y.flatten(3)))
        h, C = states(mixer.scan, u)
        h1, h2 = h.unflatten(-1, (heads, -1)).chunk(2, 3)
        h = torch.cat([gathered(near, h1), gathered(far, h2)], 3)
        fused = torch.einsum("mn,bhwnd->bhwmd", mixer.state_fusion.weight, h) + mixer.state_fusion.bias[:, None]
        y = fused.flatten(3) * C + mixer.scan.D[0] * u
    return mixer.proj(layer_normed(mixer.proj_norm, (layer_normed(mixer.norm, y) + position) * gate))


def defined_lass(mixer, x):
    q, k, v, position = projected(mixer, x, mixer.num_heads)
    y = gathered(weights(q, k, mixer.position_bias, (1, 1)), v)
    if mixer.global_attention:
        y = attention_to_all(mixer, q, k, y).transpose(1, 2).reshape(x.shape)
    else:
        y = y.flatten(3)
        conv = convolved(mixer.conv, y)
        y = y + layer_normed(mixer.norm, mixer.scan(F.silu(batch_normed(mixer.conv_norm, conv))))
    return mixer.proj(y + position)


DEFINED = {"mass": defined_mass, "lass": defined_lass}


@pytest.mark.parametrize("global_attention", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", DEFINED)
def test_equals_definition(name, grid, global_attention):
    mixer, x = build(name, global_attention=global_attention).double(), image(name, grid).requires_grad_()
    out, expected = mixer(x), DEFINED[name](mixer, x)
    assert torch.allclose(out, expected, atol=1e-9)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(each, leaves, grad) for each in (out, expected)), strict=True)
    assert all(torch.allclose(own, other, rtol=1e-6, atol=1e-8) for own, other in pairs)
    with torch.no_grad(), kernels.use("reference"):
        assert torch.allclose(mixer(x), expected, atol=1e-9)


@pytest.mark.parametrize("global_attention", [False, True])
@pytest.mark.parametrize("name", DEFINED)
def test_norms_fold(name, global_attention):
    mixer, x = build(name, global_attention=global_attention).double(), image(name, (5, 6))
    with torch.no_grad():
        expected = mixer(x)
        mixer.reparameterize()
        assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in mixer.modules())
        assert torch.allclose(mixer(x), expected, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("global_attention", [False, True])
@pytest.mark.parametrize("name", DEFINED)
def test_half_precision(name, global_attention, dtype, autocast):
    mixer, x = build(name, global_attention=global_attention), image(name, (5, 6)).float()
    check_half_precision(mixer, x, DEFINED[name], dtype, autocast)


def test_states_beyond_float16_reach_the_norm():
    """What is read from them would overflow if heads were joined in float16."""
    mixer, x = build("mass"), image("mass", (5, 6)).float()
    with torch.no_grad():
        mixer.state_fusion.weight.mul_(1e6)
        expected = mixer.double()(x.double())
        with torch.autocast("cpu", torch.float16):
            out = mixer.float()(x)
    assert (out - expected).abs().max() <= 0.02 * expected.abs().max()


def test_biases_of_pairs_follow_the_map():
    bias = PairBias(2, (2, 3)).double()
    torch.nn.init.normal_(bias.bias_table)
    wanted = F.interpolate(bias.bias_table[None], size=(20, 20), mode="bicubic")[0]
    assert torch.equal(bias.table(6), bias.bias_table)
    assert torch.allclose(bias.table(20), wanted)
    assert torch.allclose(bias.fit_tensor("bias_table", torch.ones(1, 2, 9, 9)), torch.ones(2, 6, 6))
    other = torch.ones(3, 9, 9)
    assert bias.fit_tensor("bias_table", other) is other
    bias.set_grid_size((4, 5))
    assert torch.allclose(bias.bias_table, wanted)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mass", {"num_heads": 3}, "num_heads=3 does not fit dim=16; give a number so that 8"),
        ("mass", {"num_heads": 0}, "num_heads=0 does not fit"),
        ("mass", {"num_heads": 1, "kernel_size": 4}, "kernel_size=4 has no middle"),
        ("lass", {"num_heads": 3}, "num_heads=3 does not divide dim=16"),
        ("lass", {"num_heads": 8}, "num_heads=8 makes heads of 2 channels; rotary positions need a multiple of 4"),
        ("lass", {"num_heads": 2, "kernel_size": -1}, "kernel_size=-1 has no middle"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(name, 16, **options)

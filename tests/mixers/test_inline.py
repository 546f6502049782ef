"""Injective linear attention against its definition, on maps and on sequences with class tokens."""

from functools import partial

import pytest
import timm
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import Grid

inline = partial(drawn_mixer, "inline", num_heads=3)


def defined(mixer, x, height, width, prefix=0, source=None):
    """The definition, image by image, head by head: every token weighs every other, with `prefix` class tokens."""
    out = []
    for tokens, mean in zip(x, (x if source is None else source).mean(dim=1), strict=True):
        q, k, v = mixer.qkv(tokens).chunk(3, dim=-1)
        y, kernels = [], []
        first, _, second = mixer.kernels
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            weights = q[:, part] @ (k[:, part] - k[:, part].mean(dim=0)).T * 4**-0.5 / len(tokens) + 1 / len(tokens)
            assert torch.allclose(weights.sum(dim=-1), torch.ones(len(tokens), dtype=x.dtype))
            y.append(weights @ v[:, part])
            hidden = F.gelu(first.weight[part, :, 0] @ mean[part] + first.bias[part])
            nine = slice(36 * head, 36 * head + 36)
            kernels.append((second.weight[nine, :, 0] @ hidden + second.bias[nine]).unflatten(0, (4, 1, 3, 3)))
        cells = v[prefix:].T.unflatten(1, (height, width))
        local = F.conv2d(cells, torch.cat(kernels), padding=1, groups=12)
        if mixer.has_lepe:
            local = local + mixer.conv(cells[None])[0]
        local = torch.cat([torch.zeros(prefix, 12, dtype=x.dtype), local.flatten(1).T])
        out.append(mixer.proj(torch.cat(y, dim=-1) + local))
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"lepe": True}, {"qkv_bias": False}])
@pytest.mark.parametrize("grid", [(5, 6), (1, 1), (2, 7)])
def test_inline_equals_definition(grid, options):
    mixer = inline(**options).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    assert torch.allclose(mixer(x).flatten(1, 2), defined(mixer, x.flatten(1, 2), *grid), atol=1e-12)


def test_kernels_come_from_another_map():
    mixer = inline(lepe=True).double()
    x, source = torch.randn(2, 2, 4, 7, 12, dtype=torch.float64)
    out = mixer.forward_from(x, source).flatten(1, 2)
    assert torch.allclose(out, defined(mixer, x.flatten(1, 2), 4, 7, source=source.flatten(1, 2)), atol=1e-12)
    assert not torch.allclose(out, mixer(x).flatten(1, 2), atol=1e-3)


@pytest.mark.parametrize("prefix", [1, 2])
def test_class_tokens_take_part_in_all_but_the_convolution(prefix):
    mixer = inline().double()
    x = torch.randn(2, prefix + 4 * 7, 12, dtype=torch.float64)
    out = mixer.forward_tokens(x, Grid(4, 7, list(range(prefix)), None))
    assert torch.allclose(out, defined(mixer, x, 4, 7, prefix), atol=1e-12)


def test_gradients_equal_those_of_the_definition():
    mixer = inline(lepe=True).double()
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves, grad = [x, *mixer.parameters()], torch.randn(2, 20, 12, dtype=torch.float64)
    grads = torch.autograd.grad(mixer(x).flatten(1, 2), leaves, grad)
    expected = torch.autograd.grad(defined(mixer, x.flatten(1, 2), 4, 5), leaves, grad)
    for own, other in zip(grads, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-8, atol=1e-10)


def test_graphs_serve_other_batches():
    """The convolution's groups, one an image and channel, are no constant of a graph."""
    mixer = inline().eval()
    x, other = torch.randn(2, 5, 6, 12), torch.randn(3, 4, 7, 12)
    axes = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    exported = torch.export.export(mixer, (x,), dynamic_shapes=(axes,)).module()
    for graph in (torch.jit.trace(mixer, (x,)), torch.jit.script(mixer), exported):
        assert torch.allclose(graph(other), mixer(other), atol=1e-5)


def test_inline_names_mistakes():
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("inline", 12, num_heads=5)
    lost = Grid(4, 7, [], torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dropped or merged"):
        inline().forward_tokens(torch.zeros(1, 3, 12), lost)


def test_cswins_predict_from_what_is_not_normed():
    model = timm.create_model("test_inline_cswin").eval()
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 4, 5, 16) + 3.0  # a level that the norm takes away
    y = block.norm1(x)
    normed, expected = x + block.mixer(y), x + block.mixer.forward_from(y, x)
    assert not torch.allclose(normed, expected, atol=1e-3)
    assert torch.allclose(block(x), expected + block.mlp(block.norm2(expected)), atol=1e-6)


@pytest.mark.parametrize("options", [{"mixer": "mala"}, {"mixer": ["mala", "inline", "mala", "mala"]}])
def test_blocks_that_hand_over_their_input_refuse_other_mixers(options):
    with pytest.raises(ValueError, match=r"MagnitudeAwareLinearAttention predicts no kernels.*block_layer="):
        timm.create_model("test_inline_cswin", **options)

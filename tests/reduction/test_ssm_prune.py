"""Pruning of state-space models: a naive pass over the whole sequence, and where it cannot serve."""

import math

import pytest
import timm
import torch
from torch import Tensor

from visionmix import reduction
from visionmix.backbones import Plain
from visionmix.models.vim import VARIANTS

OPTIONS = {"img_size": 96, "depth": 4, "drop_path_rate": 0.1}


def vim(**options) -> torch.nn.Module:
    """Return a small Vim in eval mode, of weights large enough that its states matter."""
    torch.manual_seed(0)
    model = Plain(**VARIANTS["test_vim_tiny"].layout.options | OPTIONS | options).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("x_proj.weight", "in_proj.weight", "mixer.proj.weight")):
                value.normal_(std=0.3)
    return model.eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(1)).double()


def naive(model, image: Tensor, keep_rate: float, layers) -> tuple[Tensor, list[int]]:
    """Return logits and the positions that are left, image by image, in the whole sequence's order throughout."""
    x, grid = model.embed(image)
    (middle,), left = grid.prefix_positions, list(range(x.shape[1]))
    for index, block in enumerate(model.blocks):
        forward, backward = block.mixer.directions(block.norm1(x), torch.tensor([left]))
        x = x + block.mixer.merged(forward, backward)
        if index in layers:
            score = (forward.relu() + backward.relu()).sum(-1)[0].tolist()
            cells = sorted((place for place in left if place != middle), key=lambda place: -score[left.index(place)])
            kept = sorted([middle, *cells[: math.ceil(keep_rate * len(cells))]])
            x = x[:, [left.index(place) for place in kept]]
            left = kept
    x = model.norm(x)[:, left.index(middle)]
    return model.head.fc(x), left


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2, 3]])
def test_it_is_its_definition(layers):
    model = vim()
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.6, layers=layers, trace_source=True)
    with torch.no_grad():
        tokens = fast.forward_tokens(images())
        logits = fast(images())
        for index, image in enumerate(images()):
            expected, left = naive(model, image[None], 0.6, layers)
            torch.testing.assert_close(logits[index], expected[0])
            assert tokens.position[index].sort().values.tolist() == left
        unaligned = reduction.apply(model, "ssm_prune", keep_rate=0.6, layers=layers, align=False)(images())
        assert layers == [3] or not torch.allclose(unaligned, logits, atol=1e-6)


def test_the_class_token_lies_where_the_head_looks():
    fast = reduction.apply(vim(), "ssm_prune", keep_rate=0.5, layers=[0, 2], trace_source=True)
    tokens = fast.forward_tokens(images())
    (place,) = tokens.prefix_positions
    assert (tokens.x.shape[1], place) == (10, 4)
    assert (tokens.position[:, place] == 18).all()
    cells = torch.cat([tokens.position[:, :place], tokens.position[:, place + 1 :]], dim=1)
    assert (cells.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("side", "middle", "kept"), [(96, 18, [18, 8]), (80, 13, [12, 6])])
def test_the_released_code_takes_the_middle_for_the_class_token(side, middle, kept):
    """Where the cells are odd in number, as 25 of 80 pixels are, the middle is the cell behind the class token."""
    model = vim(img_size=side)
    x, _ = model.embed(image := images(1)[..., :side, :side])
    left = list(range(x.shape[1]))
    for index, block in enumerate(model.blocks):
        forward, backward = block.mixer.directions(block.norm1(x))
        x = x + block.mixer.merged(forward, backward)
        if index in (1, 2):
            score = backward.sum(-1)[0].flip(0).tolist()
            ranked = sorted((place for place in left if place != middle), key=lambda place: -score[left.index(place)])
            cells = sorted(ranked[: kept[index - 1]])
            cells.insert(len(cells) // 2, middle)
            x, left = x[:, [left.index(place) for place in cells]], cells
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=[1, 2], released=True, trace_source=True)
    torch.testing.assert_close(fast(image), model.head.fc(model.norm(x)[:, left.index(middle)]))
    assert fast.forward_tokens(image).position[0].tolist() == left


def test_every_cell_has_its_last_value():
    model = vim()
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=[1])
    whole = model.forward_intermediates(images(), output_fmt="NHWC", intermediates_only=True)
    maps = fast.forward_intermediates(images(), output_fmt="NHWC", intermediates_only=True)
    for index in (0, 1):
        torch.testing.assert_close(maps[index], whole[index])
    same = (maps[3] == maps[1]).all(-1).flatten(1)
    assert same.sum(1).tolist() == [18, 18]  # those that went behind block 1 of 36
    features, pairs = fast.forward_intermediates(images(), indices=1, return_prefix_tokens=True, norm=True)
    torch.testing.assert_close(pairs[0][1][:, 0], features[:, 9])


def test_gradients_flow_and_repeat():
    fast = reduction.apply(vim(), "ssm_prune", keep_rate=0.5, layers=[0, 2]).train()
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        fast.zero_grad()
        fast(images()).square().sum().backward()
        grads.append([value.grad.clone() for value in fast.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_default_layers_are_the_published():
    with torch.device("meta"):
        model = timm.create_model("vim_tiny")
    rates = reduction.apply(model, "ssm_prune").reduction.keep_rate
    assert [index for index, rate in enumerate(rates) if rate < 1] == [4, 9, 14]


def test_without_a_class_token():
    model = vim(prefix_tokens=None, global_pool="avg")
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=[1])
    assert fast(images()).shape == (2, 1000)
    assert fast.forward_features(images()).shape == (2, 6, 6, 32)
    torch.testing.assert_close(reduction.apply(model, "ssm_prune", keep_rate=1.0)(images()), model(images()))


def test_compiles_whole():
    torch.compiler.reset()
    fast = reduction.apply(vim(), "ssm_prune", keep_rate=0.5, layers=[1])
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), fast(images()))


def test_what_it_cannot_prune():
    with pytest.raises(TypeError, match=r"SoftmaxAttention cannot; .*'bidirectional_mamba'"):
        reduction.apply(timm.create_model("test_plain"), "ssm_prune")
    hilbert = {"name": "bidirectional_mamba", "order": "hilbert"}
    with pytest.raises(ValueError, match=r"order='hilbert'.*'raster'"):
        reduction.apply(timm.create_model("test_vim_tiny", mixer=hilbert), "ssm_prune")
    with pytest.raises(ValueError, match="keep_rate"):
        reduction.apply(timm.create_model("test_vim_tiny"), "ssm_prune", keep_rate=1.5)

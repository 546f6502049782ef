"""Agent attention against its definition, on maps and on sequences with class tokens."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from torch import nn
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import Grid

agent = partial(drawn_mixer, "agent", num_heads=3, num_agents=9, grid_size=(5, 6))


def defined(mixer, x, height, width, prefix=0):
    """The definition, with `prefix` class tokens in front, cell by cell where the mixer pools by a matrix."""
    heads, dim = mixer.num_heads, x.shape[-1]
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)

    def as_map(y):
        return y[:, prefix:].transpose(1, 2).unflatten(2, (height, width))

    def split(y):
        return y.unflatten(-1, (heads, dim // heads)).transpose(1, 2)

    def bias(table, rows, columns, class_bias):
        rows = F.interpolate(rows, size=height, mode="linear")[..., None]
        columns = F.interpolate(columns, size=width, mode="linear")[:, :, None]
        cells = (F.interpolate(table, size=(height, width), mode="bilinear") + rows + columns).flatten(2)
        return torch.cat([class_bias.expand(-1, -1, prefix), cells], dim=2)

    none = torch.zeros(heads, 9, 1)
    key_class, query_class = (mixer.key_class, mixer.query_class) if mixer.class_bias else (none, none)
    agents = split(nn.AdaptiveAvgPool2d(3)(as_map(q)).flatten(2).transpose(1, 2))
    scale = (dim // heads) ** -0.5
    key_bias = bias(mixer.key_table, mixer.key_rows, mixer.key_columns, key_class)
    gathered = (agents @ split(k).mT * scale + key_bias).softmax(-1) @ split(v)
    query_bias = bias(mixer.query_table, mixer.query_rows, mixer.query_columns, query_class).mT
    out = ((split(q) @ agents.mT * scale + query_bias).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    local = mixer.conv(as_map(v)).flatten(2).transpose(1, 2)
    return mixer.proj(torch.cat([out[:, :prefix], out[:, prefix:] + local], dim=1))


@pytest.mark.parametrize("grid", [(5, 6), (1, 1), (2, 7), (9, 4)])
def test_agent_equals_definition(grid):
    mixer = agent()
    x = torch.randn(2, *grid, 12)
    expected = defined(mixer, x.flatten(1, 2), *grid)
    assert torch.allclose(mixer(x).flatten(1, 2), expected, atol=1e-5)


@pytest.mark.parametrize("class_bias", [False, True])
@pytest.mark.parametrize("prefix", [1, 2])
def test_class_tokens_take_part_in_agent_attention(prefix, class_bias):
    mixer = agent(class_bias=class_bias)
    x = torch.randn(2, prefix + 4 * 7, 12)
    out = mixer.forward_tokens(x, Grid(4, 7, list(range(prefix)), None))
    assert torch.allclose(out, defined(mixer, x, 4, 7, prefix), atol=1e-5)


def test_place_of_the_class_token_does_not_matter():
    mixer = agent(class_bias=True)
    x = torch.randn(2, 1 + 4 * 7, 12)
    first = mixer.forward_tokens(x, Grid(4, 7, [0], None))
    order = [*range(1, 15), 0, *range(15, 29)]
    middle = mixer.forward_tokens(x[:, order], Grid(4, 7, [14], None))
    assert torch.allclose(middle, first[:, order], atol=1e-6)


def test_set_grid_size_equals_resampling_at_every_call():
    mixer, again = agent(), agent()
    x = torch.randn(1, 5, 6, 12)
    before = again(x)
    again.set_grid_size((5, 6))
    assert torch.equal(again(x), before)
    again.set_grid_size((8, 3))
    assert again.key_rows.shape == (3, 9, 8)
    assert again.query_columns.shape == (3, 9, 3)
    other = torch.randn(1, 8, 3, 12)
    assert torch.allclose(again(other), mixer(other), atol=1e-6)


def test_agent_names_mistakes():
    with pytest.raises(ValueError, match="num_agents=8 is not a square number"):
        create_mixer("agent", 12, num_agents=8)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("agent", 12, num_heads=5)
    lost = Grid(4, 7, [], torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dropped or merged"):
        agent().forward_tokens(torch.zeros(1, 3, 12), lost)

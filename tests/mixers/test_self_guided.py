"""SG-Former's mixers against their definitions, written out cell by cell."""

import pytest
import timm
import torch
from drawn import drawn_mixer

import visionmix
from visionmix.mixers import SelfGuidedAttention
from visionmix.mixers.self_guided import _ranks

GRIDS = [(6, 9), (5, 7), (1, 1), (3, 4)]


def local(mixer, x):
    return mixer.lepe_conv(mixer.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def attended(q, k, v, heads):
    """Return softmax attention of (queries, dim) to (keys, dim), and the mean weight that every key receives."""
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(0, 1) for each in (q, k, v))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1), weights.mean(dim=[0, 1])


@pytest.mark.parametrize("num_heads", [4, 3])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_hybrid_scale_equals_definition(grid, num_heads):
    height, width = grid
    mixer = drawn_mixer("hybrid_scale", dtype=torch.float64, num_heads=num_heads, sr_ratio=2, window_size=3)
    heads = {4: 2, 3: 3}[num_heads]
    x = torch.randn(1, height, width, 12, dtype=torch.float64)
    rows, columns = -(-height // 6) * 6, -(-width // 6) * 6  # what both 2 and 3 divide
    padded = torch.zeros(1, rows, columns, 12, dtype=torch.float64)
    padded[:, :height, :width] = x
    pooled = mixer.sr(padded.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, : -(-height // 2), : -(-width // 2)]
    k, v = mixer.global_kv(mixer.act(mixer.norm(pooled))).flatten(0, 2).chunk(2, -1)
    coarse, received = attended(mixer.global_q(x).flatten(0, 2), k, v, heads)
    received = received.reshape(pooled.shape[1:3])
    significance = torch.tensor([[received[i // 2, j // 2] for j in range(width)] for i in range(height)])
    qkv = torch.zeros(rows, columns, 18, dtype=torch.float64)
    qkv[:height, :width] = mixer.local_qkv(x)[0]
    fine = torch.zeros(rows, columns, 6, dtype=torch.float64)
    weights = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(0, rows, 3):
        for j in range(0, columns, 3):
            y, received = attended(*qkv[i : i + 3, j : j + 3].flatten(0, 1).chunk(3, -1), heads)
            fine[i : i + 3, j : j + 3], weights[i : i + 3, j : j + 3] = y.view(3, 3, 6), received.view(3, 3)
    y = torch.cat([coarse.view(height, width, 6), fine[:height, :width]], dim=-1)
    out, weighed = mixer.with_significance(x)
    assert torch.allclose(out, mixer.proj(y + local(mixer, x)))
    assert torch.allclose(out, mixer(x))
    assert torch.allclose(weighed[0], significance + weights[:height, :width])


@pytest.mark.parametrize("sizes", [(4, 3, 2), (3, 1), (5,), ()])
@pytest.mark.parametrize("grid", [*GRIDS, (4, 12)])
@torch.no_grad()
def test_self_guided_equals_definition(grid, sizes):
    mixer = drawn_mixer("self_guided", dtype=torch.float64, num_heads=3, group_sizes=sizes)
    x = torch.randn(1, *grid, 12, dtype=torch.float64)
    cells = x.flatten(0, 2)
    for significance in (torch.randn(1, *grid, dtype=torch.float64), None):
        weights = x.norm(dim=-1) if significance is None else significance
        ranked = [cells[index] for index in sorted(range(len(cells)), key=lambda index: weights.flatten()[index])]
        ends = {3: (1, 3, 4), 2: (2, 4), 1: (4,), 0: ()}[len(sizes)]
        keys, begin = [] if sizes else list(cells), 0
        for merge, size, quarter in zip(mixer.merges, sizes, ends, strict=True):
            end = len(ranked) * quarter // 4
            part, begin = ranked[begin:end], end
            places = -(-len(part) // size) * size
            filled = [part[place * len(part) // places] for place in range(places)]
            keys += [
                sum(w * cell for w, cell in zip(merge.weight[0], filled[start : start + size], strict=True))
                + merge.bias
                for start in range(0, places, size)
            ]
        k, v = mixer.kv(torch.stack(keys)).chunk(2, -1)
        y, _ = attended(mixer.q(cells), k, v, 3)
        assert torch.allclose(mixer(x, significance), mixer.proj(y.view_as(x) + local(mixer, x)))


def test_whole_groups_take_every_cell_once():
    ranks = [
        _ranks(torch.zeros(1, 784, 1), begin, end, size) for begin, end, size in ((0, 1, 49), (1, 3, 14), (3, 4, 7))
    ]
    assert torch.equal(torch.cat(ranks), torch.arange(784))
    assert _ranks(torch.zeros(1, 12, 1), 1, 3, 4).tolist() == [3, 3, 4, 5, 6, 6, 7, 8]


@torch.no_grad()
def test_a_stage_hands_significance_from_block_to_block():
    torch.manual_seed(0)
    stage = timm.create_model("test_sgformer").double().eval().stages[0]
    x = torch.randn(2, 12, 10, 16, dtype=torch.float64)
    first, second = stage.blocks
    y = stage.pos_embed(x)
    mixed, significance = first.mixer.with_significance(first.norm1(y))
    y = y + mixed
    y = y + first.mlp(first.norm2(y))
    other = y + second.mixer(second.norm1(y))
    y = y + second.mixer(second.norm1(y), significance)
    assert not torch.allclose(y, other)
    assert torch.allclose(stage(x), stage.norm(y + second.mlp(second.norm2(y))))


def test_sgformer_blocks_take_other_mixers():
    model = timm.create_model("test_sgformer", mixer=["conv", {"cycle": ["self_guided", "conv"]}, "na", "softmax"])
    assert isinstance(model.stages[1].blocks[0].mixer, SelfGuidedAttention)
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 1000)


def test_positions_begin_as_waves_of_columns_and_rows():
    weight = timm.create_model("test_sgformer").stages[0].pos_embed.weight
    assert weight.shape == (1, 24, 24, 16)
    waves = 10000.0 ** (-torch.arange(4) / 4)
    for row, column in ((0, 0), (3, 17), (23, 5)):
        parts = [wave(at * waves) for at in (column, row) for wave in (torch.sin, torch.cos)]
        # In any order: what reads them begins at random.
        assert torch.allclose(weight[0, row, column].sort().values, torch.cat(parts).sort().values, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("hybrid_scale", {"dim": 9}, "dim=9"),
    ("hybrid_scale", {"num_heads": 10}, "num_heads=10"),
    ("hybrid_scale", {"sr_ratio": 0}, "sr_ratio=0"),
    ("hybrid_scale", {"window_size": 0}, "window_size=0"),
    ("self_guided", {"num_heads": 5}, "num_heads=5"),
    ("self_guided", {"group_sizes": (4, 0)}, r"group_sizes=\(4, 0\)"),
    ("self_guided", {"group_sizes": (1,) * 5}, "group_sizes="),
])  # fmt: skip
def test_self_guided_refuses_options_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        visionmix.create_mixer(name, **{"dim": 12} | options)

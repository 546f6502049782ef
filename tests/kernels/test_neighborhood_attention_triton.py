"""How the Triton kernels of neighborhood attention are launched; test_triton.py runs them."""

import pytest

pytest.importorskip("triton")

from visionmix.kernels.gpu import Target, plan
from visionmix.kernels.neighborhood_attention import triton as implementation
from visionmix.kernels.neighborhood_attention import triton_boxes
from visionmix.kernels.neighborhood_attention.windows import axis_window, class_lengths
from visionmix.tools import compile_kernels
from visionmix.tools.kernel_problems import neighborhood_attention


def planned(*problem, dtype="bfloat16", **options):
    with plan(Target("cuda", 90)) as launches:
        neighborhood_attention(*problem, **options)(compile_kernels.DTYPES[dtype])
    return launches


@pytest.mark.parametrize(
    ("side", "kernel_size", "options", "boxes"),
    [
        (56, 7, {"bias": True}, {"forward", "query_gradients", "bias_gradients", "key_gradients"}),
        (56, 9, {}, {"forward", "query_gradients", "key_gradients"}),
        # A tile of keys near the border is seen by more queries than a tile of queries sees keys.
        (56, 13, {}, {"forward", "query_gradients"}),
        (56, 7, {"dilation": 8}, {"forward", "query_gradients", "key_gradients"}),
        (56, 6, {"stride": 2}, {"forward", "query_gradients", "key_gradients"}),
        (56, 7, {"key_heads": 1}, {"forward", "query_gradients"}),
        (56, 15, {"bias": True}, set()),
        # Groups of three queries lie across tiles.
        (56, 7, {"stride": 3}, set()),
        (56, 7, {"extra": 1}, set()),
    ],
)
def test_kernels_whose_boxes_fit_a_block_take_them_at_once(side, kernel_size, options, boxes):
    names = {launch.kernel.fn.__name__ for launch in planned((side, side), 2, 32, kernel_size, **options)}
    expected = {f"box_{name}_kernel" for name in boxes | ({"table"} if boxes else set())}
    assert {name for name in names if name.startswith("box_")} == expected


def test_wide_heads_take_their_box_in_blocks():
    names = [launch.kernel.fn.__name__ for launch in planned((56, 56), 2, 128, 7)]
    assert names == ["forward_kernel", "query_gradients_kernel", "key_gradients_kernel"]


def test_launches_of_boxes_cover_the_map_and_count_what_they_read():
    launches = planned((56, 56), 3, 32, 7, batch=128)
    forward, keys = launches[1], launches[-1]
    assert forward.arguments["box"].TILE == keys.arguments["box"].TILE == (1, 4, 4)
    # Eight images a program.
    assert forward.grid == keys.grid == (14 * 14, 3, 128 // 8)
    # Tiles at the border see 7 keys along an axis, the others 10; 7 and 11 queries see the first two tiles of keys.
    assert forward.arguments["box"].WIDTH == (1, 10, 10)
    assert forward.passes["p_k"] == ((12 * 10 + 2 * 7) / 56) ** 2
    assert keys.arguments["box"].WIDTH == (1, 11, 11)
    assert keys.passes["p_q"] == ((2 * 7 + 2 * 11 + 10 * 10) / 56) ** 2
    # Along an axis four kinds of tiles of queries at most, and six of keys.
    assert [launch.arguments["p_table"].shape for launch in (launches[0], launches[-2])] == [
        (16, 1, 16, 128),
        (36, 1, 16, 128),
    ]


def test_launches_of_blocks_cover_the_map_and_count_what_they_read(monkeypatch):
    monkeypatch.setattr(triton_boxes, "choose", lambda *_: None)
    size, kernel_size, dilation = 23, 5, 2
    launches = planned((size,), 2, 32, kernel_size, dilation=dilation)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "forward_kernel",
        "query_gradients_kernel",
        "key_gradients_kernel",
    ]
    tile = launches[0].arguments["blocks"].TILE[-1]
    tiles = max(class_lengths(size, dilation)) // tile + (max(class_lengths(size, dilation)) % tile > 0)
    assert launches[0].grid == (2 * dilation * tiles,)
    # One tile covers a class, whose keys are all read once.
    assert launches[0].passes["p_k"] == launches[2].passes["p_q"] == 1
    pairs = sum(
        sum(stops) - sum(starts)
        for starts, stops in (axis_window(n, kernel_size, 1, False, False) for n in class_lengths(size, dilation))
    )
    assert [launch.flops for launch in launches] == [2 * pairs * 4 * 32, 2 * pairs * 6 * 32, 2 * pairs * 8 * 32]


@pytest.mark.parametrize(("sizes", "most", "tile"), [([1, 56, 56], 64, (1, 8, 8)), ([1, 1, 3], 64, (1, 1, 16))])
def test_tiles_are_powers_of_two(sizes, most, tile):
    assert implementation._tile(sizes, most) == tile


def test_a_disc_of_any_radii():
    # (dy / 4)^2 + (dx / 2)^2 < 1.
    *weights, limit, wide = implementation._disc((1, 7, 3))
    assert (weights[1:], limit, wide) == ([1, 4], 16, False)
    assert implementation._disc((1, 7, 7))[3:] == (16, False)
    assert implementation._disc((81, 73, 61))[4]

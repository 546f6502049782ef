"""How the Triton kernels of neighborhood attention are launched; test_triton.py runs them."""

import pytest

pytest.importorskip("triton")

from visionmix.kernels.gpu import Target, plan
from visionmix.kernels.neighborhood_attention import triton as implementation
from visionmix.kernels.neighborhood_attention.windows import axis_window, class_lengths
from visionmix.tools import compile_kernels
from visionmix.tools.kernel_problems import neighborhood_attention


def test_launches_cover_the_map_and_count_what_they_read():
    size, kernel_size, dilation = 23, 5, 2
    with plan(Target("cuda", 90)) as launches:
        neighborhood_attention((size,), 2, 32, kernel_size, dilation=dilation)(compile_kernels.DTYPES["bfloat16"])
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "forward_kernel",
        "query_gradients_kernel",
        "key_gradients_kernel",
    ]
    tile = launches[0].arguments["TILE"][-1]
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

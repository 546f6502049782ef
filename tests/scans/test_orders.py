"""What holds of every order on every grid."""

import ast
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmix import scans
from visionmix.scans import grammar, orders

NUMBERED = {
    "atrous": ["atrous_1", "atrous_2", "atrous_5"],
    "atrous_window": ["atrous_window_2_3", "atrous_window_7_1", "atrous_window_7_2"],
    "skip": ["skip_2_0_0", "skip_2_1_0", "skip_3_1_2"],
    "window": ["window_1", "window_2", "window_7"],
    "window_snake": ["window_snake_2", "window_snake_7"],
}
NAMES = [name for base in scans.names() for name in NUMBERED.get(base, [base])]
TRUE = [name for name in NAMES if name != "column_unswapped"]  # whose inverse is the true one
PERMUTATIONS = [name for name in TRUE if not name.startswith(("window", "atrous_window", "skip"))]
CONTINUOUS = ["snake", "hilbert", "spiral", "snake_transposed", "hilbert_hflip_reversed"]
VOLUMETRIC = ["raster", "column", "snake", "morton", "u_order"]
MODIFIED = ["", *(f"_{modifier}" for modifier in scans.MODIFIERS), "_transposed_reversed", "_hflip_transposed_vflip"]

sides = st.integers(1, 40)


def moves(index, height, width, depth=1):
    """Return the Manhattan distance of every step."""
    position = torch.stack(torch.unravel_index(index, (height, width, depth)))
    return position.diff(dim=1).abs().sum(0)


def transposed(index, height, width):
    """Return cells of a (width, height) grid as those of the transposed grid (height, width)."""
    return torch.where(index < 0, -1, index % height * width + index // height)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TRUE), st.sampled_from(MODIFIED), sides, sides)
def test_every_order_reads_cells_once_and_its_inverse_finds_them(base, modifiers, height, width):
    name = base + modifiers
    index, inverse = scans.order(name, height, width)
    cells = height * width
    assert index.dtype == inverse.dtype == torch.int64
    assert index.shape == (scans.num_steps(name, height, width),)
    assert inverse.shape == (cells,)
    assert index.min() >= -1
    read = index[index >= 0]
    assert len(read.unique()) == len(read)
    assert torch.equal(inverse[read], (index >= 0).nonzero().squeeze(1))
    if base.startswith("skip"):
        unread = torch.ones(cells, dtype=torch.bool).index_fill(0, read, False)
        assert (inverse[unread] == -1).all()
    else:
        assert torch.equal(index[inverse], torch.arange(cells))
    if base in PERMUTATIONS:
        assert len(index) == cells


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(VOLUMETRIC), st.sampled_from(MODIFIED), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_orders_of_volumes(base, modifiers, height, width, depth):
    index, inverse = scans.order(base + modifiers, height, width, depth)
    cells = torch.arange(height * width * depth)
    assert torch.equal(index.sort().values, cells)
    assert torch.equal(index[inverse], cells)
    if base == "snake":
        assert (moves(index, height, width, depth) == 1).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_orders_move_to_a_neighbour_in_every_step(name):
    for height in range(1, 26):
        for width in range(1, 26):
            assert (moves(scans.order(name, height, width).index, height, width) == 1).all(), (height, width)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120))
def test_hilbert_moves_to_a_neighbour_in_every_step_of_any_rectangle(height, width):
    index = scans.order("hilbert", height, width).index
    assert index[0] == 0
    assert (moves(index, height, width) == 1).all()
    assert torch.equal(index.sort().values, torch.arange(height * width))


@pytest.mark.long
def test_hilbert_on_every_rectangle_up_to_128():
    for height in range(1, 129):
        for width in range(1, 129):
            index = orders._build("hilbert", height, width, 1).index
            assert (moves(index, height, width) == 1).all(), (height, width)
            assert len(index.unique()) == height * width


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_of_a_power_of_two_walks_quadrant_by_quadrant(side):
    index = scans.order("hilbert", side, side).index.view(4, -1)
    row, column = index // side, index % side
    quadrant = (row >= side // 2) * 2 + (column >= side // 2)
    assert (quadrant == quadrant[:, :1]).all()
    assert len(quadrant[:, 0].unique()) == 4


def test_hilbert_keeps_neighbours_close_on_a_long_rectangle():
    # A walk to the far end and back would put cells next to each other hundreds of steps apart.
    for height, width in ((2, 301), (301, 2), (4, 151), (150, 5)):
        inverse = scans.order("hilbert", height, width).inverse.view(height, width)
        apart = max(inverse.diff(dim=0).abs().max().item(), inverse.diff(dim=1).abs().max().item())
        assert apart <= 4 * min(height, width) ** 2


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), sides, sides)
def test_modifiers_do_what_they_say(name, height, width):
    order = scans.order(name, height, width)
    assert torch.equal(scans.order(f"{name}_reversed", height, width).index, order.index.flip(0))
    other = scans.order(name, width, height).index
    assert torch.equal(scans.order(f"{name}_transposed", height, width).index, transposed(other, height, width))
    row, column, padded = order.index // width, order.index % width, order.index < 0
    hflip = torch.where(padded, -1, row * width + width - 1 - column)
    vflip = torch.where(padded, -1, (height - 1 - row) * width + column)
    assert torch.equal(scans.order(f"{name}_hflip", height, width).index, hflip)
    assert torch.equal(scans.order(f"{name}_vflip", height, width).index, vflip)
    for twice in scans.MODIFIERS:
        again = scans.order(f"{name}_{twice}_{twice}", height, width)
        assert torch.equal(again.index, order.index)
        assert torch.equal(again.inverse, order.inverse)


def test_modifiers_apply_from_left_to_right():
    cells = torch.arange(6).view(2, 3)
    assert torch.equal(scans.order("raster_transposed_hflip", 2, 3).index, cells.flip(1).T.reshape(-1))
    assert torch.equal(scans.order("raster_hflip_transposed", 2, 3).index, cells.flip(0).T.reshape(-1))


SMALL = {
    ("raster", 2, 3): [0, 1, 2, 3, 4, 5],
    ("column", 2, 3): [0, 3, 1, 4, 2, 5],
    ("snake", 3, 2): [0, 1, 3, 2, 4, 5],
    ("morton", 2, 4): [0, 1, 4, 5, 2, 3, 6, 7],
    ("morton", 3, 3): [0, 1, 3, 4, 2, 5, 6, 7, 8],
    ("hilbert", 2, 2): [0, 2, 3, 1],
    ("hilbert", 4, 4): [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3],
    ("diagonal", 2, 3): [0, 1, 3, 2, 4, 5],
    ("zigzag", 3, 3): [0, 1, 3, 6, 4, 2, 5, 7, 8],
    ("spiral", 3, 4): [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6],
    ("window_2", 3, 2): [0, 1, 2, 3, 4, 5, -1, -1],
    ("window_snake_2", 2, 3): [0, 1, 4, 3, 2, -1, -1, 5],
    ("atrous_2", 3, 3): [0, 2, 6, 8, 1, 7, 3, 5, 4],
    ("atrous_window_2_2", 3, 4): [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, -1, -1, 5, 7, -1, -1],
    ("atrous_window_1_2", 2, 4): [0, 1, 4, 5, 2, 3, 6, 7],
    ("skip_2_1_0", 3, 3): [3, 5, -1, -1],
    ("u_order", 2, 2): [0, 1, 3, 2],
}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_grids_written_out(case):
    assert scans.order(*case).index.tolist() == SMALL[case]


@pytest.mark.parametrize("name", NAMES)
def test_single_cell(name):
    index, inverse = scans.order(name, 1, 1)
    assert (index == 0).sum() == (0 if name in ("skip_2_1_0", "skip_3_1_2") else 1)
    assert len(inverse) == 1


def test_morton_of_a_volume_interleaves_three_coordinates():
    index = scans.order("morton", 2, 2, 2).index
    assert torch.equal(index, torch.arange(8))
    row, column, level = torch.unravel_index(scans.order("morton", 4, 4, 4).index, (4, 4, 4))
    assert torch.equal((row // 2 * 4 + column // 2 * 2 + level // 2), torch.arange(64) // 8)


def test_sequence_there_and_back():
    tokens = torch.randn(2, 5 * 7, 3)
    order = scans.order("window_2", 5, 7)
    sequence = tokens[:, order.index]  # what padded steps hold does not matter here
    assert torch.equal(sequence[:, order.inverse], tokens)


def test_joined_orders_are_read_one_after_the_other():
    joined = scans.order("raster_reversed+window_2+skip_2_0_1", 3, 5)
    parts = [scans.order(name, 3, 5) for name in ("raster_reversed", "window_2", "skip_2_0_1")]
    assert torch.equal(joined.index, torch.cat([part.index for part in parts]))
    assert len(joined.index) == scans.num_steps("raster_reversed+window_2+skip_2_0_1", 3, 5)
    inverse = joined.inverse.view(3, 15)
    assert torch.equal(joined.index[inverse[:2]], torch.arange(15).expand(2, 15))
    assert torch.equal(inverse[2] == -1, parts[2].inverse == -1)


def test_unswapped_inverse_is_the_true_one_on_squares_only():
    assert torch.equal(scans.order("column_unswapped", 6, 6).inverse, scans.order("column", 6, 6).inverse)
    assert not torch.equal(scans.order("column_unswapped", 6, 9).inverse, scans.order("column", 6, 9).inverse)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(TRUE), st.integers(1, 12), st.integers(1, 12), st.integers(0, 20))
def test_registers_stand_between_the_steps(name, height, width, count):
    order = scans.order(name, height, width)
    index, inverse = scans.insert_registers(order, count)
    cells = height * width
    assert len(index) == len(order.index) + count
    assert len(inverse) == cells + count
    assert torch.equal(index[index < cells], order.index)
    assert torch.equal(index[inverse[cells:]], torch.arange(cells, cells + count))
    read = inverse >= 0
    assert torch.equal(index[inverse[read]], torch.arange(cells + count)[read])


@pytest.mark.parametrize(
    ("count", "error", "message"), [(-1, ValueError, "negative"), (1.0, TypeError, "float"), (True, TypeError, "bool")]
)
def test_bad_number_of_registers(count, error, message):
    with pytest.raises(error, match=message):
        scans.insert_registers(scans.order("raster", 2, 2), count)


def test_move_codes_of_jumps_and_padding_are_zero():
    index = torch.tensor([0, 1, 4, 3, -1, -1, 0, 3, 0, 2])  # on a grid 3 wide
    assert scans.move_codes(index, 3).tolist() == [0, 1, 4, 2, 0, 0, 0, 4, 3, 0]
    assert scans.move_codes(torch.tensor([2, 3]), 3).tolist() == [0, 0]  # the end of a row and the start of the next


def test_results_may_be_written_to():
    for device in (None, "cpu"):
        scans.order("hilbert", 5, 6, device=device).index.zero_()
        scans.order("hilbert", 5, 6, device=device).inverse.zero_()
    index, inverse = scans.order("hilbert", 5, 6)
    assert torch.equal(index[inverse], torch.arange(30))


def test_an_order_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        scans.order("spiral", 11, 3)
    tokens = torch.randn(33, 2, requires_grad=True)
    tokens[scans.order("spiral", 11, 3).index].square().sum().backward()
    assert torch.allclose(tokens.grad, 2 * tokens)


def test_under_another_default_device():
    with torch.device("meta"):
        assert scans.order("hilbert", 9, 4).index[0] == 0
    assert scans.order("hilbert", 9, 4, device="meta").index.device.type == "meta"


def test_cache_is_bounded_and_keeps_what_was_used_last(monkeypatch):
    built = []
    build = orders._build
    monkeypatch.setattr(orders, "_build", lambda *size: built.append(size[2]) or build(*size))
    cache = orders._Cache(limit=10_000)
    for width in (20, 21, 20, 22, 20, 23, 20, 24, 20):  # 3200 bytes and more each: three fit
        cache.get("raster", 10, width, 1, torch.device("cpu"))
        assert cache.bytes == sum(map(orders._size, cache.orders.values())) <= 10_000
    assert built == [20, 21, 22, 23, 24]


def test_a_large_hilbert_order_is_fast():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        orders._build("hilbert", 512, 512, 1)
        times.append(time.perf_counter() - start)
    # About 5 ms on one core; a loop over the cells takes a second.
    assert min(times) < 0.2


def test_names_of_bad_orders_are_answered_with_the_nearest():
    for name, message in {
        "hilbrt": "did you mean 'hilbert'",
        "hilbert_reversd": "did you mean 'hilbert_reversed'",
        "windw_7": "did you mean 'window_7'",
        "window_7_transpose": "did you mean 'window_7_transposed'",
        "raster+snak": "no scan order is called 'snak' in 'raster[+]snak'; did you mean 'snake'",
        "window": "window is written as window_<size>",
        "window_7_7": "window is written as window_<size>",
        "hilbert_2": "'hilbert_2' has 1 number[(]s[)]; hilbert is written as hilbert",
        "window_0": "the size must be at least 1",
        "skip_2_2_0": "below the rate, 2",
        "": "no scan order is called ''",
        "reversed": "no scan order",
        "Hilbert": "did you mean 'hilbert'",
        "xxxxxxxxxxxx": "scans.names",
    }.items():
        for call in (scans.order, torch.ops.visionmix.scan_order, scans.num_steps):
            with pytest.raises(ValueError, match=message):
                call(name, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("hilbert", 0, 5), ValueError, "height=0 .* at least 1"),
        (("hilbert", 5, -1), ValueError, "width=-1"),
        (("raster", 5, 5, 0), ValueError, "depth=0"),
        (("hilbert", 5.0, 5), TypeError, "height=5.0 is a float"),
        (("hilbert", 5, "5"), TypeError, "width='5' is a str"),
        (("hilbert", True, 5), TypeError, "height=True is a bool"),
        ((None, 5, 5), TypeError, "name=None is a NoneType"),
        (
            ("spiral", 5, 5, 2),
            ValueError,
            "depth=2 needs one of column, morton, raster, snake, u_order",
        ),
        (("raster+spiral", 5, 5, 2), ValueError, "two-dimensional"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        scans.order(*arguments)


def test_every_base_is_listed_and_tested():
    assert scans.names() == sorted(grammar.BASES)
    assert {key for key, base in grammar.BASES.items() if base.volumetric} == set(VOLUMETRIC)
    assert {key for key, base in grammar.BASES.items() if base.numbers} == set(NUMBERED)


def test_scans_import_torch_and_the_registry_alone():
    for file in Path(scans.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                room = module.split(".")[0]
                own = module.startswith("visionmix.scans") or module == "visionmix.registry"
                assert own or room in sys.stdlib_module_names or room == "torch", file


RASTER = torch.arange(4)[None]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: scans.insert_registers("raster", 2), TypeError, "order='raster' is a str"),
        (lambda: scans.move_codes(torch.ones(4), 2), TypeError, "index is torch.float32"),
        (lambda: scans.move_codes(RASTER[0], 0), ValueError, "width=0"),
        (lambda: scans.move_codes(RASTER[0], 2.0), TypeError, "width=2.0"),
        (lambda: scans.kept_steps(RASTER, torch.zeros(1, 2)), TypeError, "kept is torch.float32"),
        (lambda: scans.kept_steps(RASTER[0], torch.zeros(1, 2).long()), ValueError, "inverses has 1 axes"),
        (lambda: scans.kept_steps(RASTER, torch.tensor([[0, 4]])), ValueError, "cells from 0 to 3"),
        (lambda: scans.kept_steps(RASTER, torch.tensor([[0, -1]])), ValueError, "kept has cells from -1"),
        (lambda: scans.kept_steps(RASTER, torch.tensor([[0, 1], [3, 3]])), ValueError, "a cell twice"),
        (lambda: scans.order(f"window_{10**24}", 4, 4), ValueError, r"below 2\*\*31"),
    ],
)
def test_wrong_arguments_of_helpers_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()

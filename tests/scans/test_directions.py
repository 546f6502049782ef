"""Direction sets and their names."""

import pytest
import torch

from visionmix import scans
from visionmix.scans.cells import numbered


@pytest.mark.parametrize("name", scans.direction_sets())
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 8), (14, 14)])
def test_every_direction_of_every_set_is_an_order(name, height, width):
    directions = scans.directions(name, height, width)
    assert len(directions) == len(scans.direction_names(name))
    for direction, order in zip(scans.direction_names(name), directions, strict=True):
        assert torch.equal(order.index, scans.order(direction, height, width).index)
        assert torch.equal(order.inverse, scans.order(direction, height, width).inverse)


def test_routes_of_a_single_order():
    expected = ("hilbert", "hilbert_transposed", "hilbert_reversed", "hilbert_transposed_reversed")
    assert scans.direction_names("hilbert") == expected
    assert scans.direction_names("cross") == scans.direction_names("raster")
    assert scans.direction_names("window_7")[1] == "window_7_transposed"
    for forward, transposed, backward, transposed_backward in (scans.directions("hilbert", 6, 9),):
        assert torch.equal(forward.index, backward.index.flip(0))
        assert torch.equal(transposed.index, transposed_backward.index.flip(0))


def test_skip_scan_reads_every_cell_in_one_direction():
    for height, width in ((1, 1), (7, 9), (8, 8)):
        read = torch.cat([order.index for order in scans.directions("efficientvmamba", height, width)])
        assert torch.equal(read[read >= 0].sort().values, torch.arange(height * width))


def test_volumes():
    for order in scans.directions("occmamba", 5, 3, 2):
        # The levels of a cell are read one after the other.
        assert torch.equal(order.index.view(-1, 2).diff(dim=1), torch.ones(15, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="two-dimensional"):
        scans.directions("mhs_vm", 5, 3, 2)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("crss", ValueError, "did you mean 'cross'"),
        ("plain_mamba", ValueError, "did you mean 'plainmamba'"),
        ("hilbrt", ValueError, "did you mean 'hilbert'"),
        ("raster+column", ValueError, "joined"),
        (3, TypeError, "name=3 is a int"),
    ],
)
def test_unknown_sets(name, error, message):
    with pytest.raises(error, match=message):
        scans.direction_names(name)
    with pytest.raises(error, match=message):
        scans.directions(name, 4, 4)


@pytest.mark.parametrize("count", [0, 1, 2, 61])
def test_numbers_are_counted_up(count):
    like = torch.zeros(3)
    assert torch.equal(numbered(count, like), torch.arange(count))
    assert numbered(count, like.to("meta")).device.type == "meta"

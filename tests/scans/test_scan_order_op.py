"""The op visionmix::scan_order in eager, scripted, traced, exported and compiled graphs."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from visionmix import scans

NAMES = ["hilbert", "window_7_transposed", "skip_2_1_1_transposed", "raster_reversed+window_snake_2"]
SIZES = [(5, 9), (14, 14), (7, 3)]


class Reorder(nn.Module):
    """Reads a map in scan order, sums along the sequence, and puts the result back on the grid."""

    def __init__(self, name: str = "hilbert_transposed"):
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        index, inverse = torch.ops.visionmix.scan_order(self.name, height, width, x.device)
        sequence = x.reshape(batch, height * width, channels)[:, index].cumsum(1)
        return sequence[:, inverse].reshape(batch, height, width, channels)


def expected(x, name="hilbert_transposed"):
    order = scans.order(name, *x.shape[1:3])
    return x.flatten(1, 2)[:, order.index].cumsum(1)[:, order.inverse].view_as(x)


@pytest.mark.parametrize("name", NAMES)
def test_op_equals_function(name):
    for height, width in SIZES:
        index, inverse = torch.ops.visionmix.scan_order(name, height, width, torch.device("cpu"))
        order = scans.order(name, height, width)
        assert torch.equal(index, order.index)
        assert torch.equal(inverse, order.inverse)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(torch.ops.visionmix.scan_order.default, (name, 5, 9))
    torch.library.opcheck(torch.ops.visionmix.scan_order.default, (name, 5, 9, torch.device("cpu")))


def test_opcheck_of_a_volume():
    torch.library.opcheck(torch.ops.visionmix.scan_order.default, ("u_order_transposed", 5, 4, None, 3))


@pytest.mark.parametrize("name", NAMES)
def test_fake_has_the_shapes_of_the_real_one(name):
    for height, width in SIZES:
        order = scans.order(name, height, width)
        with FakeTensorMode():
            fake = scans.order(name, height, width)
        assert fake.index.shape == order.index.shape
        assert fake.inverse.shape == order.inverse.shape
        assert type(scans.order(name, height, width).index) is torch.Tensor  # no fake tensor in the cache


def test_scripted():
    scripted = torch.jit.script(Reorder())
    for height, width in SIZES:
        x = torch.randn(2, height, width, 3)
        torch.testing.assert_close(scripted(x), expected(x))


def test_move_codes_scripted():
    index = scans.order("snake", 5, 7).index
    scripted = torch.jit.script(scans.move_codes)
    assert torch.equal(scripted(index, 7), scans.move_codes(index, 7))


def test_fx_traced():
    traced = torch.fx.symbolic_trace(Reorder())
    for height, width in SIZES:
        x = torch.randn(2, height, width, 3)
        torch.testing.assert_close(traced(x), expected(x))


def test_exported_with_dynamic_sizes():
    dim = torch.export.Dim.AUTO
    program = torch.export.export(Reorder(), (torch.randn(2, 5, 9, 3),), dynamic_shapes=({1: dim, 2: dim},))
    for height, width in SIZES:
        x = torch.randn(2, height, width, 3)
        torch.testing.assert_close(program.module()(x), expected(x))


def test_compiled_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(Reorder(), fullgraph=True, dynamic=True, backend=counter)
    for height, width in SIZES:
        x = torch.randn(2, height, width, 3)
        torch.testing.assert_close(compiled(x), expected(x))
    assert counter.frame_count == 1


def test_function_compiles_too():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def read(x):
        order = scans.insert_registers(scans.order("window_2", x.shape[0], x.shape[1]), 3)
        return order.index + 1, order.inverse + 1, scans.move_codes(order.index, x.shape[1])

    for height, width in SIZES:
        index, inverse, moves = read(torch.zeros(height, width))
        order = scans.insert_registers(scans.order("window_2", height, width), 3)
        assert torch.equal(index, order.index + 1)
        assert torch.equal(inverse, order.inverse + 1)
        assert torch.equal(moves, scans.move_codes(order.index, width))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_graph_leaves_the_cache_alone(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def overwrite(x):
        index, inverse = torch.ops.visionmix.scan_order("snake", x.shape[0], x.shape[1], x.device)
        return index.mul_(2), inverse.zero_()

    order = scans.order("snake", 6, 7)
    for _ in range(2):
        doubled, zeros = overwrite(torch.zeros(6, 7))
        assert torch.equal(doubled, order.index * 2)
        assert not zeros.any()
    assert torch.equal(scans.order("snake", 6, 7).inverse, order.inverse)


def test_bad_calls_of_the_op():
    with pytest.raises(ValueError, match="height=0"):
        torch.ops.visionmix.scan_order("hilbert", 0, 5)
    with pytest.raises(ValueError, match="did you mean 'hilbert'"):
        torch.ops.visionmix.scan_order("hilbertt", 5, 5)


def test_not_imported_under_its_folder_name():
    run = subprocess.run(
        [sys.executable, "-c", "import scans"],
        cwd=scans.__path__[0] + "/..",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "import this as visionmix.scans" in run.stderr

"""One graph for every batch and size: the references exported with symbols for sizes, run at others."""

import random

import pytest
import torch
from random_calls import OPS
from tolerance import assert_close
from torch import nn
from torch.export import Dim

from visionmix import scans
from visionmix.kernels import use
from visionmix.kernels.gated_linear_attention import bidirectional_op, gated_linear_attention_op
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op
from visionmix.kernels.selective_scan import selective_scan_op
from visionmix.kernels.selective_scan_2d import selective_scan_2d_op
from visionmix.layers.order import scan_order
from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file


class Attention(nn.Module):
    """Maps (batch, height, width, 8), two directions and one, with a state before the first token."""

    def forward(self, x):
        q, k, v, g = x.flatten(1, 2).unflatten(-1, (2, 4)).unsqueeze(0).expand(4, -1, -1, -1, -1).unbind(0)
        state = torch.ones_like(x[:, 0, 0]).unflatten(-1, (2, 4)).unsqueeze(-1).expand(-1, -1, -1, 4)
        one, last = gated_linear_attention_op(q, k, v, -g.abs(), 0.5, state, True)
        return bidirectional_op(q, k, v, -g.abs(), -k.abs(), 0.5, "mean") + one, last


class Scan(nn.Module):
    """A scan of the cells in rows, two groups, with every option."""

    def forward(self, x):
        u = x.flatten(1, 2).transpose(1, 2)
        B = u.unflatten(1, (2, 4))
        A, D = -torch.arange(1.0, 33.0).view(8, 4) / 20, torch.linspace(0, 1, 8)
        gap = u.abs() * (u > 0)
        return selective_scan_op(u, u, A, B, B.flip(1), D, u, D, True, True, gap)


class Maps(nn.Module):
    """The scan of maps in several orders."""

    def __init__(self, orders: str, merge: str = "sum", permute: str = "all", rank: bool = False):
        super().__init__()
        self.orders, self.merge, self.permute, self.rank = orders, merge, permute, rank

    def forward(self, x):
        count = self.orders.count(",") + 1
        maps = x.unsqueeze(3).expand(-1, -1, -1, count, -1)
        A, D = -torch.arange(1.0, 17.0).view(8, 2).expand(count, -1, -1) / 20, torch.linspace(0, 1, 8).expand(count, -1)
        weight = torch.linspace(0, 1, 16).view(8, 2).expand(count, -1, -1) if self.rank else None
        delta = maps[..., :2] if self.rank else maps
        options = (D, D, True, self.orders, self.merge, self.permute)
        return selective_scan_2d_op(x, delta, weight, A, maps[..., 2:4], maps[..., 4:6], *options)


class Neighborhood(nn.Module):
    """Neighborhood attention of maps; heads of 2 channels."""

    def __init__(self, kernel_size=3, stride=1, dilation=1, causal=0, circular=False, options=True):
        super().__init__()
        self.window = [[x, x] for x in (kernel_size, stride, dilation, causal)]
        self.circular, self.options = circular, options
        self.bias = torch.linspace(-1, 1, 4 * (2 * kernel_size - 1) ** 2).view(4, *[2 * kernel_size - 1] * 2)

    def forward(self, x):
        q = x.unflatten(-1, (4, 2))
        k = q[..., :2, :]
        extra = x[:, 0, :1].unflatten(-1, (4, 2))[..., 2:, :] if self.options else None
        paddings = (self.bias[:2, 0, :1].expand(-1, 2), None) if self.options else (None, None)
        bias = self.bias if self.options else None
        return neighborhood_attention_op(q, k, -k, *self.window, 0.5, extra, extra, bias, self.circular, *paddings)


MODELS = {
    "attention": Attention(),
    "scan": Scan(),
    "cross": Maps("raster,raster_transposed,raster_reversed,raster_transposed_reversed"),
    "windows": Maps("window_2,skip_2_0_1,column_unswapped,window_snake_3_transposed_hflip", "none", rank=True),
    "curves": Maps("snake,diagonal,zigzag_vflip,spiral,morton,u_order,atrous_2,atrous_window_2_2", "mean"),
    "joined": Maps("raster_reversed+raster_transposed,snake+column", "none"),
    "input": Maps("snake,raster_reversed", permute="input"),
    "window": Neighborhood(),
    "window, no options": Neighborhood(5, options=False),
    "dilated": Neighborhood(3, 1, 2),
    "strided": Neighborhood(4, 3),
    "causal": Neighborhood(3, 2, 2, 1),
    "disc": Neighborhood(5, 1, 2, 0, True),
    "disc, causal": Neighborhood(3, 1, 1, 1, True),
}


# Each takes seconds: one of every op and kind of table, the cheapest, is tried in the quick suite.
QUICK = ("attention", "scan", "input", "disc, causal")


@pytest.mark.parametrize(
    "model", [pytest.param(m, id=n, marks=[] if n in QUICK else [pytest.mark.long]) for n, m in MODELS.items()]
)
def test_reference_exported_once_serves_other_sizes(model):
    with use("reference"):
        axes = dict.fromkeys(range(3), Dim.DYNAMIC)
        program = torch.export.export(model, (torch.randn(2, 6, 7, 8),), dynamic_shapes=(axes,))
        for size in ((2, 6, 7), (3, 9, 5), (5, 5, 11), (2, 13, 5)):
            x = torch.randn(*size, 8)
            for ours, theirs in zip(program.module()(x), model(x), strict=True):
                assert_close(ours, theirs, str(size))


@pytest.mark.long
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "all sizes"])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if isinstance(model, Neighborhood)])
def test_neighborhood_attention_in_onnx_runtime(name, fixed, tmp_path):
    """Log-sum-exp and all, and with maps of several tiles and of less than one."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Joined(nn.Module):
        def forward(self, x):
            out, lse = MODELS[name](x)
            return torch.cat([out, lse.unsqueeze(-1)], -1)

    axes = None if fixed else {0: "batch", 1: "height", 2: "width"}
    to_onnx(Joined(), torch.randn(2, 9, 19, 8), tmp_path / "model.onnx", dynamic=axes)
    run, _ = open_file(tmp_path / "model.onnx")
    for size in ((2, 9, 19),) if fixed else ((2, 9, 19), (3, 5, 4), (1, 22, 8)):
        x = torch.randn(*size, 8)
        assert_close(run(x), Joined()(x), str(size))


@pytest.mark.parametrize("name", ["window_7", "window_snake_7_transposed", "atrous_window_3_3", "skip_6_1_2"])
def test_order_exported_for_a_map_of_one_window_serves_maps_of_several(name):
    class Order(nn.Module):
        def forward(self, x):
            return scan_order(name, x.shape[0], x.shape[1], x)

    with use("reference"):
        axes = dict.fromkeys(range(2), Dim.DYNAMIC)
        program = torch.export.export(Order(), (torch.randn(6, 7),), dynamic_shapes=(axes,)).module()
        for size in ((6, 7), (7, 6), (9, 40), (23, 5), (15, 22)):
            assert all(map(torch.equal, program(torch.randn(size)), scans.order(name, *size))), size


@pytest.mark.parametrize("name", ["hilbert", "raster+hilbert_reversed"])
def test_order_that_depends_on_the_size_is_refused(name):
    axes = dict.fromkeys(range(3), Dim.DYNAMIC)
    with (
        use("reference"),
        pytest.raises(ValueError, match=r"hilbert.*cannot be exported with dynamic"),
    ):
        torch.export.export(Maps(name), (torch.randn(2, 6, 7, 8),), dynamic_shapes=(axes,))


# Of one direction and of maps; the others are exported by test_reference_exported_once_serves_other_sizes, too.
@pytest.mark.parametrize(
    "op",
    [
        op if op in ("selective_scan", "neighborhood_attention") else pytest.param(op, marks=pytest.mark.long)
        for op in OPS
    ],
)
def test_batch_alone_dynamic(op):
    """With the sizes of the map fixed, the references' own loops, and tiles, serve every batch."""

    class Model(nn.Module):
        def forward(self, tensors):
            return call.run(*(tensors.get(name) for name in call.tensors))

    for seed in range(60):
        call = OPS[op](random.Random(f"{op} {seed}"))
        batch = next(iter(call.tensors.values())).shape[0]
        if batch > 1:
            break
    shared = ("A", "D", "delta_bias", "delta_weight", "relative_position_bias", "key_padding", "value_padding")
    tensors = {name: x for name, x in call.tensors.items() if x is not None}
    with_batch = {name for name, x in tensors.items() if name not in shared and x.dim() > 2}
    axes = {name: {0: Dim.DYNAMIC} if name in with_batch else {} for name in tensors}
    with use("reference"):
        program = torch.export.export(Model(), (tensors,), dynamic_shapes=(axes,)).module()
        for repeats in (1, 3):
            more = {n: x.repeat(repeats, *[1] * (x.dim() - 1)) if n in with_batch else x for n, x in tensors.items()}
            for ours, theirs in zip(program(more), Model()(more), strict=True):
                assert_close(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_traced(op):
    """A trace has tensors in place of sizes."""

    class Model(nn.Module):
        def forward(self, *given):
            left = iter(given)
            out = call.run(*(None if x is None else next(left) for x in call.tensors.values()))
            return tuple(x for x in out if x.numel())

    for seed in range(4):
        call = OPS[op](random.Random(f"{op} {seed}"))
        given = tuple(x for x in call.tensors.values() if x is not None)
        with use("reference"):
            traced = torch.jit.trace(Model(), given, check_trace=False)
        for ours, theirs in zip(traced(*given), Model()(*given), strict=True):
            assert_close(ours, theirs)

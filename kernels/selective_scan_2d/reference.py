"""The selective scan over several orders of a map, in PyTorch: gather, the one-dimensional reference, gather back."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visionmix.kernels import dispatch
from visionmix.kernels.exported import is_symbolic
from visionmix.kernels.selective_scan import reference as scan
from visionmix.kernels.selective_scan import schema as scan_schema
from visionmix.kernels.selective_scan_2d.schema import SCHEMA, Arguments, Gradients
from visionmix.kernels.selective_scan_2d.steps import GivenSteps, NamedSteps
from visionmix.scans.order_names import count_routes, split_orders
from visionmix.scans.orders import symbolic_order


def _channels(x: Tensor) -> Tensor:
    """(batch, K, steps, channels) to (batch, K x channels, steps)."""
    return x.transpose(2, 3).flatten(1, 2)


def _orders_last(x: Tensor, orders: int) -> Tensor:
    """Undo `_channels`."""
    return x.unflatten(1, (orders, -1)).transpose(2, 3)


class _Inputs:
    """The arguments of the one-dimensional scan."""

    def __init__(self, a: Arguments):
        self.dtype = dtype = dispatch.compute_dtype(*SCHEMA.input_tensors(a))
        self.reader = NamedSteps(a) if a.cells is None else GivenSteps(a)
        u = self.reader.read_x(a.x.to(dtype).flatten(1, 2))
        self.steps = self.reader.read_maps(a.delta.to(dtype))
        self.weight = None if a.delta_weight is None else a.delta_weight.to(dtype)
        full = self.steps if self.weight is None else self.steps @ self.weight.transpose(1, 2)
        self.bias = a.A.new_zeros(a.A.shape[:2], dtype=dtype) if a.delta_bias is None else a.delta_bias.to(dtype)
        gap = None
        if a.gaps is not None:
            self.gaps = a.gaps.to(dtype).unsqueeze(2)  # (batch, K, 1, steps)
            gap = (self.gaps * self.gap_step(a).unsqueeze(2)).flatten(1, 2)
        self.scan = scan_schema.Arguments(
            u=_channels(u),
            delta=_channels(full),
            A=a.A.flatten(0, 1),
            B=self.reader.read_maps(a.B.to(dtype)).transpose(2, 3),
            C=self.reader.read_maps(a.C.to(dtype)).transpose(2, 3),
            D=None if a.D is None else a.D.flatten(),
            z=None,
            delta_bias=None if a.delta_bias is None else a.delta_bias.flatten(),
            delta_softplus=a.delta_softplus,
            return_last_state=False,
            gap=gap,
        )

    def gap_step(self, a: Arguments) -> Tensor:
        """Return the step size of a place without a token, (K, channels)."""
        return F.softplus(self.bias) if a.delta_softplus else self.bias

    def through_gaps(self, a: Arguments, grad_gap: Tensor) -> Tensor:
        """Return the gradient that `delta_bias` has by the gaps, from that of the 1-D scan's gap."""
        grad = (self.gaps * grad_gap.unflatten(1, self.bias.shape)).sum((0, 3))
        # softplus(x) is x above 20, so its derivative is 1 there.
        return grad * torch.where(self.bias > 20, 1, self.bias.sigmoid()) if a.delta_softplus else grad


def _read(maps: Tensor, cells: Tensor) -> Tensor:
    """(batch, height, width, features) to (batch, features, steps), zeros where no cell is read."""
    flat = F.pad(maps.flatten(1, 2), (0, 0, 0, 1))
    return flat.index_select(1, torch.where(cells < 0, flat.shape[1] - 1, cells)).transpose(1, 2)


def _exported(a: Arguments) -> list[Tensor]:
    """Return the routes' maps in a graph that serves every size.

    Orders of as many steps, such as the four of VMamba, are the groups of one scan: a scan is most of the graph.
    """
    dtype = dispatch.compute_dtype(*SCHEMA.input_tensors(a))
    height, width = a.x.shape[1:3]
    names = split_orders(a.orders)
    tables = [[table.to(a.x.device) for table in symbolic_order(name, height, width)] for name in names]
    found = [[] for _ in names]
    for numbers in _alike([index.shape[0] for index, _ in tables]):
        inputs = zip(*(_inputs_of(a, number, tables[number][0], dtype) for number in numbers), strict=True)
        u, steps, B, C, A, D, bias = (None if each[0] is None else torch.cat(each, 1) for each in inputs)
        A, D, bias = (None if each is None else each.squeeze(0) for each in (A, D, bias))
        out, *_ = scan.forward(scan_schema.Arguments(u, steps, A, B, C, D, None, bias, a.delta_softplus, False))
        for number, y in zip(numbers, out.chunk(len(numbers), 1), strict=True):
            taken = _read(y.transpose(1, 2).unsqueeze(1), tables[number][1])
            maps = taken.unflatten(2, (count_routes(names[number]), height, width))
            found[number] = [route.permute(0, 2, 3, 1) for route in maps.unbind(2)]
    return [route for maps in found for route in maps]


def _alike(sizes: list[int]) -> list[list[int]]:
    """Return the numbers of the sizes, together those that are equal whatever their symbols stand for."""
    sets: list[list[int]] = []
    for number, size in enumerate(sizes):
        for numbers in sets:
            if statically_known_true(sizes[numbers[0]] == size):
                numbers.append(number)
                break
        else:
            sets.append([number])
    return sets


def _inputs_of(a: Arguments, number: int, index: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return u, delta, B, C, A, D and the steps' bias of one order, with what differs between orders on axis 1."""
    place = index if a.permute == "all" else torch.arange(a.x.shape[1] * a.x.shape[2], device=a.x.device)
    steps, B, C = (_read(maps[..., number, :].to(dtype), place) for maps in (a.delta, a.B, a.C))
    if a.delta_weight is not None:
        steps = a.delta_weight[number].to(dtype) @ steps
    A, D, bias = (None if each is None else each[number].unsqueeze(0) for each in (a.A, a.D, a.delta_bias))
    return _read(a.x.to(dtype), index), steps, B.unsqueeze(1), C.unsqueeze(1), A, D, bias


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return the merged outputs, and nothing: the backward pass finds the states itself.

    Shapes as `selective_scan_2d`, the order names joined by commas.
    """
    x, dtype = a.x, a.out_dtype or a.x.dtype
    if a.cells is None and is_symbolic(x.shape[1], x.shape[2]):
        maps = _exported(a)
        out = torch.stack(maps, 3) if a.merge == "none" else sum(maps)
        out = out / len(maps) if a.merge == "mean" else out
        return out.to(dtype), out.new_empty(0)
    inputs = _Inputs(a)
    out, *_ = scan.forward(inputs.scan)
    out = inputs.reader.write(_orders_last(out, a.A.shape[0]))
    out = out / inputs.reader.routes if a.merge == "mean" else out
    return out.unflatten(1, x.shape[1:3]).to(dtype).contiguous(), out.new_empty(0)


def backward(a: Arguments, gradients: Gradients) -> tuple[Tensor, ...]:
    """Return the gradients of the eight tensors of the input, in their dtypes, empty for what is None."""
    inputs = _Inputs(a)
    reader, count = inputs.reader, a.A.shape[0]
    grad = gradients.grad_out.to(inputs.dtype).flatten(1, 2)
    grad = reader.write_back(grad / reader.routes if a.merge == "mean" else grad)
    of_scan = scan_schema.Gradients(_channels(grad), None, None)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, _, grad_bias, grad_gap = scan.backward(inputs.scan, of_scan)
    grad_steps = _orders_last(grad_delta, count)
    grad_weight = a.x.new_empty(0)
    if inputs.weight is not None:
        grad_weight = torch.einsum("bksc,bksr->kcr", grad_steps, inputs.steps).to(a.delta_weight.dtype)
        grad_steps = grad_steps @ inputs.weight
    if a.delta_bias is not None:
        grad_bias = grad_bias.view(a.delta_bias.shape)
        if a.gaps is not None:
            grad_bias = (grad_bias + inputs.through_gaps(a, grad_gap)).to(a.delta_bias.dtype)

    def maps(grad: Tensor, like: Tensor) -> Tensor:
        return reader.maps_back(grad, like).to(like.dtype).contiguous()

    return (
        reader.x_back(_orders_last(grad_u, count)).view(a.x.shape).to(a.x.dtype),
        maps(grad_steps, a.delta),
        grad_weight.contiguous(),
        grad_A.view(a.A.shape),
        maps(grad_B.transpose(2, 3), a.B),
        maps(grad_C.transpose(2, 3), a.C),
        grad_D if a.D is None else grad_D.view(a.D.shape),
        grad_bias,
    )

"""The selective scan over several orders of a map, in PyTorch: gather, the one-dimensional reference, gather back."""

import torch
from torch import Tensor

from visionmix.kernels import dispatch
from visionmix.kernels.exported import is_symbolic
from visionmix.kernels.selective_scan import reference as scan
from visionmix.kernels.selective_scan_2d.routes import SEPARATOR, Routes, routes, take, take_sum
from visionmix.scans.orders import symbolic_order


def _sequences(maps: Tensor, table: Routes, dtype: torch.dtype) -> Tensor:
    """(batch, height, width, K, features), one map an order, to (batch, K, steps, features)."""
    flat = maps.to(dtype).flatten(1, 3)
    return take(flat, table.of_maps).unflatten(1, table.index.shape)


def _maps(grad: Tensor, table: Routes, like: Tensor) -> Tensor:
    """The gradient of `_sequences`."""
    return take_sum(grad.flatten(1, 2), table.of_maps_back).view(like.shape).to(like.dtype)


def _channels(x: Tensor) -> Tensor:
    """(batch, K, steps, channels) to (batch, K x channels, steps)."""
    return x.transpose(2, 3).flatten(1, 2)


def _orders_last(x: Tensor, orders: int) -> Tensor:
    """Undo `_channels`."""
    return x.unflatten(1, (orders, -1)).transpose(2, 3)


class _Inputs:
    """The arguments of the one-dimensional scan."""

    def __init__(self, x, delta, delta_weight, A, B, C, D, delta_bias, orders, permute):
        self.dtype = dispatch.compute_dtype(x, delta, delta_weight, A, B, C, D, delta_bias)
        self.table = routes(orders, x.shape[1], x.shape[2], permute)
        self.u = take(x.to(self.dtype).flatten(1, 2), self.table.index).unflatten(1, self.table.index.shape)
        self.steps = _sequences(delta, self.table, self.dtype)
        self.weight = None if delta_weight is None else delta_weight.to(self.dtype)
        full = self.steps if self.weight is None else self.steps @ self.weight.transpose(1, 2)
        self.arguments = (
            _channels(self.u),
            _channels(full),
            A.flatten(0, 1),
            _sequences(B, self.table, self.dtype).transpose(2, 3),
            _sequences(C, self.table, self.dtype).transpose(2, 3),
            None if D is None else D.flatten(),
            None,
            None if delta_bias is None else delta_bias.flatten(),
        )


def _read(maps: Tensor, cells: Tensor) -> Tensor:
    """(batch, height, width, features) to (batch, features, steps), zeros where no cell is read."""
    flat = torch.nn.functional.pad(maps.flatten(1, 2), (0, 0, 0, 1))
    return flat.index_select(1, torch.where(cells < 0, flat.shape[1] - 1, cells)).transpose(1, 2)


def _exported(x, delta, delta_weight, A, B, C, D, delta_bias, delta_softplus, orders, permute) -> list[Tensor]:
    """Return the routes' maps in a graph that serves every size: one order after the other, in its own steps."""
    dtype = dispatch.compute_dtype(x, delta, delta_weight, A, B, C, D, delta_bias)
    height, width = x.shape[1:3]
    found = []
    for number, name in enumerate(orders.split(SEPARATOR)):
        index, inverse = (table.to(x.device) for table in symbolic_order(name, height, width))
        place = index if permute == "all" else torch.arange(height * width, device=x.device)
        steps, b, c = (_read(maps[..., number, :].to(dtype), place) for maps in (delta, B, C))
        if delta_weight is not None:
            steps = delta_weight[number].to(dtype) @ steps
        options = (None if option is None else option[number] for option in (D, delta_bias))
        skip, bias = options
        arguments = (_read(x.to(dtype), index), steps, A[number], b.unsqueeze(1), c.unsqueeze(1), skip, None, bias)
        out, *_ = scan.forward(*arguments, delta_softplus, False)
        count = name.count("+") + 1
        taken = _read(out.transpose(1, 2).unsqueeze(1), inverse).unflatten(2, (count, height, width))
        found += [route.permute(0, 2, 3, 1) for route in taken.unbind(2)]
    return found


def forward(
    x: Tensor,
    delta: Tensor,
    delta_weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: str,
    merge: str,
    permute: str,
    keep_states: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the merged outputs, and nothing: the way back finds the states itself.

    Shapes as `selective_scan_2d`, the order names joined by commas.
    """
    if is_symbolic(x.shape[1], x.shape[2]):
        arguments = (x, delta, delta_weight, A, B, C, D, delta_bias, delta_softplus, orders, permute)
        routes_out = _exported(*arguments)
        merged = torch.stack(routes_out, 3) if merge == "none" else sum(routes_out)
        merged = merged / len(routes_out) if merge == "mean" else merged
        return merged.to(out_dtype or x.dtype), merged.new_empty(0)
    inputs = _Inputs(x, delta, delta_weight, A, B, C, D, delta_bias, orders, permute)
    out, *_ = scan.forward(*inputs.arguments, delta_softplus, False)
    inverse = inputs.table.inverse
    sequences = _orders_last(out, A.shape[0]).flatten(1, 2)
    if merge == "none":
        out = take(sequences, inverse).unflatten(1, inverse.shape).transpose(1, 2)
        shape = (*x.shape[:3], len(inverse), x.shape[3])
    else:
        out = take_sum(sequences, inverse)
        out = out / len(inverse) if merge == "mean" else out
        shape = x.shape
    return out.reshape(shape).to(out_dtype or x.dtype).contiguous(), out.new_empty(0)


def backward(
    grad_out: Tensor,
    x: Tensor,
    delta: Tensor,
    delta_weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: str,
    merge: str,
    permute: str,
    entering: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the eight tensors of the input, in their dtypes, empty for what is None."""
    inputs = _Inputs(x, delta, delta_weight, A, B, C, D, delta_bias, orders, permute)
    table, count = inputs.table, A.shape[0]
    grad = grad_out.to(inputs.dtype).flatten(1, 2)
    if merge == "none":
        grad = grad.transpose(1, 2).flatten(1, 2)
    else:
        grad = grad / len(table.inverse) if merge == "mean" else grad
        grad = grad.repeat(1, len(table.inverse), 1)
    grad = take_sum(grad, table.inverse_back).unflatten(1, table.index.shape)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, _, grad_bias, _ = scan.backward(
        _channels(grad), None, *inputs.arguments, delta_softplus
    )
    grad_steps = _orders_last(grad_delta, count)
    grad_weight = x.new_empty(0)
    if inputs.weight is not None:
        grad_weight = torch.einsum("bksc,bksr->kcr", grad_steps, inputs.steps).to(delta_weight.dtype)
        grad_steps = grad_steps @ inputs.weight
    grad_x = take_sum(_orders_last(grad_u, count).flatten(1, 2), table.index_back)
    return (
        grad_x.view(x.shape).to(x.dtype),
        _maps(grad_steps, table, delta),
        grad_weight.contiguous(),
        grad_A.view(A.shape),
        _maps(grad_B.transpose(2, 3), table, B),
        _maps(grad_C.transpose(2, 3), table, C),
        grad_D if D is None else grad_D.view(D.shape),
        grad_bias if delta_bias is None else grad_bias.view(delta_bias.shape),
    )

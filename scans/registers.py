"""Class tokens and registers between the steps of an order."""

import torch

from visionmix.scans.orders import ScanOrder


def insert_registers(order: ScanOrder, num_registers: int) -> ScanOrder:
    """Return the order with registers at even distances between its steps.

    With `cells` cells in the grid, one register follows every `cells // (num_registers + 1)` steps, and the steps left
    over (padded ones included) follow the last one; where an order reads only some of the cells, its steps are counted
    instead. 12 registers on a 14 x 14 grid are Mamba-Reg's (2024, arXiv:2405.14858), 1 is Vim's class
    token in the middle (2024, arXiv:2401.09417).

    Args:
        order: an order of one grid (no joined sequence).
        num_registers: how many to insert, from 0 up.

    Returns:
        An order of the tokens `cat(grid, registers)`: index, int64 (steps + num_registers,), in which cell
        `cells + i` is register i; inverse, int64 (cells + num_registers,), whose last `num_registers` elements are the
        positions of the registers in the sequence.

    Raises:
        TypeError: order is no ScanOrder, or num_registers not an int.
        ValueError: num_registers is negative.
    """
    if not isinstance(order, tuple):
        raise TypeError(f"order={order!r} is a {type(order).__name__}; give visionmix.scans.order(...)")
    if isinstance(num_registers, bool) or not isinstance(num_registers, int):
        raise TypeError(f"num_registers={num_registers!r} is a {type(num_registers).__name__}; it must be an int")
    if num_registers < 0:
        raise ValueError(f"num_registers={num_registers} is negative; 0 inserts none")
    index, inverse = order
    cells = inverse.shape[0]
    stride = torch.sym_min(cells, index.shape[0]) // (num_registers + 1)
    register = torch.arange(num_registers, device=index.device)
    positions = (register + 1) * stride + register
    step = torch.arange(index.shape[0], device=index.device)
    # Where each old step goes: after the registers that come before it.
    moved = step + (step // max(stride, 1)).clamp(max=num_registers) if num_registers else step
    moved = moved if stride else step + num_registers
    joined = index.new_empty(index.shape[0] + num_registers)
    joined[moved] = index
    joined[positions] = cells + register
    placed = torch.where(inverse < 0, -1, moved[inverse])
    return ScanOrder(joined, torch.cat([placed, positions]))

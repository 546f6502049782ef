"""Scan orders: the sequences in which token mixers read a grid of tokens.

    >>> from visionmix import scans
    >>> index, inverse = scans.order("hilbert", height=13, width=9)
    >>> [direction.index for direction in scans.directions("cross", 14, 14)]
    >>> scans.direction_names("hilbert")
    ('hilbert', 'hilbert_transposed', 'hilbert_reversed', 'hilbert_transposed_reversed')

Inside a graph (scripted, traced by fx, exported or compiled at dynamic sizes) call
`torch.ops.visionmix.scan_order(name, height, width, device)`, which importing this package registers.
"""

if __name__ == "scans":
    raise ImportError("import this as visionmix.scans (from an installed visionmix: pip install -e .)")

from visionmix.scans.grammar import MODIFIERS, names, num_steps
from visionmix.scans.kept import kept_steps
from visionmix.scans.orders import ScanOrder, order
from visionmix.scans.registers import insert_registers
from visionmix.scans.sets import direction_names, direction_sets, directions, move_codes

__all__ = [
    "MODIFIERS",
    "ScanOrder",
    "direction_names",
    "direction_sets",
    "directions",
    "insert_registers",
    "kept_steps",
    "move_codes",
    "names",
    "num_steps",
    "order",
]

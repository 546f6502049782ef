"""How the names of several orders are written: joined, listed, taken apart and counted.

An *order* is one sequence through a grid. Orders joined with `+` ("raster+snake") are read one after the other as one
sequence, and each of them brings the cells' outputs back on a *route* of its own. A list of orders is one string, their
names separated by commas, since a graph's op takes no list of strings.
"""

from collections.abc import Sequence

JOINT = "+"
SEPARATOR = ","


def join_orders(names: Sequence[str]) -> str:
    """Return the names of several orders as one string."""
    return SEPARATOR.join(names)


def split_orders(orders: str) -> list[str]:
    """Undo `join_orders`."""
    return orders.split(",")  # SEPARATOR, which TorchScript cannot read


def join_order(names: Sequence[str]) -> str:
    """Return the name of the order that reads several orders one after the other, as one sequence."""
    return JOINT.join(names)


def split_order(name: str) -> list[str]:
    """Undo `join_order`."""
    return name.split(JOINT)


def count_orders(orders: str) -> int:
    """Return the number of orders in a string of several."""
    return orders.count(SEPARATOR) + 1


def count_routes(orders: str) -> int:
    """Return the number of routes of several orders: one an order, one more for each that is joined to it."""
    return orders.count(SEPARATOR) + orders.count(JOINT) + 1

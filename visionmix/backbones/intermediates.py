"""Which maps of a pass are kept, and with which axes."""

from collections.abc import Sequence

from torch import Tensor

from visionmix.private_api import feature_take_indices
from visionmix.registry import is_int

_FORMATS = ("NCHW", "NHWC", "NLC")


def chosen_units(
    count: int, indices: int | list[int] | tuple[int, ...] | None, units: str, option: str = "out_indices"
) -> tuple[list[int], int]:
    """Return the numbers of the chosen units and the largest of them.

    Args:
        count: How many units there are.
        indices: Their numbers, negative ones from the end, how many of the last, or None for all.
        units: What they are, for messages: "stages" or "blocks".
        option: The argument's name, for messages.

    Raises:
        TypeError: the numbers are no integers.
        ValueError: there are not so many units.
    """
    if indices is None:
        return feature_take_indices(count, None)
    one = is_int(indices)
    if not one and not (isinstance(indices, Sequence) and all(map(is_int, indices))):
        raise TypeError(f"{option}={indices!r} is not of integers; give how many of the last {units}, or their numbers")
    numbers = [int(each) for each in ([indices] if one else indices)]
    lowest, highest = (1, count) if one else (-count, count - 1)
    if not numbers or any(not lowest <= each <= highest for each in numbers):
        raise ValueError(
            f"{option}={indices!r} does not fit a model of {count} {units}, numbered 0 to {count - 1}; the stem has "
            f"no map of its own. Give how many of the last, or numbers such as {tuple(range(count))}"
        )
    return feature_take_indices(count, numbers[0] if one else numbers)


def laid_out(cells: Tensor, output_fmt: str) -> Tensor:
    """Return a map (batch, rows, columns, channels) with the axes "NCHW", "NHWC", or "NLC"."""
    if output_fmt == "NLC":
        return cells.flatten(1, 2)
    return cells if output_fmt == "NHWC" else cells.permute(0, 3, 1, 2)


def check_output_format(output_fmt: str) -> None:
    """Raise ValueError unless `output_fmt` is "NCHW", "NHWC" or "NLC"."""
    if output_fmt not in _FORMATS:
        raise ValueError(f"output_fmt={output_fmt!r} is unknown; give one of {', '.join(map(repr, _FORMATS))}")

"""Checks of the arguments that na1d, na2d, na3d and the two halves of na2d share."""

from collections.abc import Sequence
from numbers import Integral

from visionmix.kernels.neighborhood_attention.tables import Window

AXES = {1: ("tokens",), 2: ("rows", "columns"), 3: ("levels", "rows", "columns")}


def per_axis(name: str, value: int | Sequence[int], axes: int, kind: type, least: int) -> list:
    """Return one value per axis.

    Raises:
        TypeError: a value is not of `kind`.
        ValueError: there are too many or too few of them, or one is below `least`.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * axes
    for x in values:
        if not isinstance(x, Integral if kind is int else kind) or (kind is int and isinstance(x, bool)):
            raise TypeError(
                f"{name}={value!r} holds a {type(x).__name__}; it must be {kind.__name__}, one or one per axis"
            )
    if len(values) != axes:
        raise ValueError(f"{name}={value!r} has {len(values)} values; na{axes}d takes one, or {axes}")
    if kind is int and min(values) < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return [int(x) for x in values] if kind is int else values


def check_window(grid: list[int], kernel_size: list[int], stride: list[int], dilation: list[int], circular: bool):
    def show(values: list[int]) -> int | tuple[int, ...]:
        return values[0] if len(set(values)) == 1 else tuple(values)

    if circular:
        if any(k % 2 == 0 for k in kernel_size):
            raise ValueError(f"kernel_size={show(kernel_size)} must be odd for a circular window")
        if any(s != 1 for s in stride):
            raise ValueError(f"stride={show(stride)} does not go with a circular window; pass stride=1")
        return
    for size, k, d, axis in zip(grid, kernel_size, dilation, AXES[len(grid)], strict=True):
        if k * d > size:
            raise ValueError(
                f"kernel_size={show(kernel_size)} does not fit a {'x'.join(map(str, grid))} grid with "
                f"dilation={show(dilation)}; it needs at least {k * d} {axis}"
            )
    if any(s > k for s, k in zip(stride, kernel_size, strict=True)):
        raise ValueError(
            f"stride={show(stride)} is larger than kernel_size={show(kernel_size)}; queries of a group would not see "
            "their own neighborhood"
        )


def check_heads(name: str, heads: int, key_name: str, key_heads: int) -> None:
    """Refuse key heads that do not divide the heads.

    Raises:
        ValueError: they do not.
    """
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{name} has {heads} heads, but {key_name} {key_heads}; theirs must divide the {name}'s")


def checked_window(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    circular: bool,
) -> Window:
    """Return the window of a map, one value per axis; its causality is 0 or 1.

    Raises:
        TypeError: an argument is no integer, or `is_causal` no bool.
        ValueError: an argument has another number of axes, or the window does not fit the map.
    """
    axes = len(grid)
    sizes = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    kernels, strides, dilations = (per_axis(name, value, axes, int, 1) for name, value in sizes.items())
    causal = [int(x) for x in per_axis("is_causal", is_causal, axes, bool, 0)]
    check_window(list(grid), kernels, strides, dilations, circular)
    return Window(kernels, strides, dilations, causal, circular)

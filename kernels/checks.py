"""Checks of the arguments of every fused op, with one style of message."""

import sys
from collections.abc import Collection
from numbers import Real

import torch
from torch import Tensor


def check_tensors(
    tensors: dict[str, Tensor | None], ranks: dict[str, tuple[int, ...]], required: Collection[str] = ()
) -> None:
    """Refuse what is not a real floating-point tensor, has a rank that `ranks` does not allow, or lies on another
    device.

    Args:
        tensors: argument names and values, None for an option not given; the first names the op's device.
        ranks: the ranks allowed, by argument name.
        required: the names of the arguments that must not be None.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not floating point.
        ValueError: an argument's rank or device does not fit.
    """
    device_name, device = "", None
    for name, x in tensors.items():
        if x is None and name not in required:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
        if x.is_complex():
            raise TypeError(f"{name} has dtype {x.dtype}; complex values are not supported, pass a real tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}; convert it to a floating-point dtype, as {name}.float()")
        if x.dim() not in ranks[name]:
            allowed = " or ".join(map(str, ranks[name]))
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {allowed} axes")
        if device is None:
            device_name, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} is on {x.device}, but {device_name} on {device}; move them to one device")


def check_shape(name: str, x: Tensor | None, axes: dict[str, int]) -> None:
    """Refuse a tensor whose shape is not that of `axes`, a dict of axis names and sizes.

    Raises:
        ValueError: the shape differs.
    """
    if x is not None and tuple(x.shape) != tuple(axes.values()):
        wanted = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name} has shape {tuple(x.shape)}; the other arguments ask for ({wanted})")


def check_sizes(name: str, x: Tensor) -> None:
    """Refuse a tensor without tokens, heads or channels; a batch of none is allowed.

    Raises:
        ValueError: an axis after the first has size 0.
    """
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; every axis after the batch must be at least 1")


def check_steps(name: str, steps: Tensor | None, like: Tensor, batch: int) -> None:
    """Refuse what is not a tensor of integers (batch, K, steps) on the device of `like`, an op's x, or has no steps.

    Raises:
        TypeError: it is not a tensor of int32 or int64.
        ValueError: its shape or its device does not fit.
    """
    if steps is None:
        return
    if not isinstance(steps, Tensor) or steps.dtype not in (torch.int32, torch.int64):
        kind = f"has dtype {steps.dtype}" if isinstance(steps, Tensor) else f"is a {type(steps).__name__}"
        raise TypeError(f"{name} {kind}; pass a tensor of int32 or int64")
    if steps.dim() != 3 or steps.shape[0] != batch or 0 in steps.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(steps.shape)}; it must be (batch={batch}, K, steps), one step or more"
        )
    if steps.device != like.device:
        raise ValueError(f"{name} is on {steps.device}, but x on {like.device}; move them to one device")


def check_out_dtype(out_dtype: torch.dtype | None) -> None:
    """Refuse an output type that is not a real floating-point dtype.

    Raises:
        TypeError: `out_dtype` is not a torch.dtype.
        ValueError: it is of integers, bools or complex numbers.
    """
    if out_dtype is None:
        return
    if not isinstance(out_dtype, torch.dtype):
        kind = type(out_dtype).__name__
        raise TypeError(f"out_dtype={out_dtype!r} is a {kind}; pass a torch.dtype, as torch.float32, or None")
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype={out_dtype} is not a real floating-point type; pass torch.float32 or None")


def check_scale(scale: float | None) -> None:
    """Refuse a factor that is not a finite number; None is left alone.

    Raises:
        TypeError: `scale` is no number.
        ValueError: it is infinite or NaN.
    """
    # In a graph that is being made, a scale that comes from a shape is a symbol or a tensor.
    if scale is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale={scale!r} is of type {type(scale).__name__}; pass a number, or None")
    if isinstance(scale, Real) and not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale={scale} is not finite; pass a number, or None")


def check_flags(**flags: bool) -> None:
    """Refuse options that are neither True nor False.

    Raises:
        TypeError: one is something else.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} is no bool; pass True or False")


def check_merge(merge: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown way of merging directions.

    Raises:
        ValueError: `merge` is none of `choices`.
    """
    if merge not in choices:
        raise ValueError(f"merge={merge!r} is unknown; choose one of {', '.join(map(repr, choices))}")

"""Calls of neighborhood attention on every path, beside its definition."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import choices
import pytest
import torch
from neighborhoods import named_tensors
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import dispatch, na1d, na2d, na3d
from visionmix.kernels.neighborhood_attention import definition, exported
from visionmix.kernels.neighborhood_attention.schema import Arguments

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ARGUMENTS = ("query", "key", "value", "additional_keys", "additional_values", "relative_position_bias")
WINDOW = ("kernel_size", "stride", "dilation", "is_causal", "scale")  # in NATTEN's order


def compiled_choices():
    try:
        dispatch.load("neighborhood_attention", "cpu")
    except dispatch.Unavailable:
        return ()
    return ("cpu",)


# PyTorch's autograd, the registered op around the reference, and the compiled kernel where there is a compiler.
CHOICES = ("reference", "op", *compiled_choices())
# What stands in exported graphs, of fixed sizes and of all, computed without a graph.
EXPORTED = ("exported", "exported for all sizes")
EACH_CHOICE = pytest.mark.parametrize("choice", CHOICES)
EXPORTED_TOO = pytest.mark.parametrize("choice", [*CHOICES, *EXPORTED])
COMPILED = pytest.mark.skipif("cpu" not in CHOICES, reason="no compiler")


@contextmanager
def choose(choice):
    with ExitStack() as stack:
        stack.enter_context(choices.choose("reference" if choice in EXPORTED else choice))
        if choice in EXPORTED:
            stack.enter_context(mock.patch.object(torch.compiler, "is_exporting", return_value=True))
            stack.enter_context(mock.patch.object(exported, "_is_fixed", return_value=choice == "exported"))
        yield


SMALL = {"dim": 4, "value_dim": 5, "extra": 0, "bias": False, "batch": 2}


def make(grid, kernel_size, heads=2, key_heads=2, seed=0, **sizes):
    """Return the tensor arguments by name, float64 with values exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).double().requires_grad_()

    return named_tensors(random, grid, kernel_size, heads=heads, key_heads=key_heads, **SMALL | sizes)


def cast(tensors, dtype):
    return {name: x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}


def run(tensors, window):
    """Return the outputs and the gradients of every tensor."""
    outs = FUNCTIONS[tensors["query"].dim() - 3](**tensors, **window, return_lse=True)
    return outs, gradients(outs, list(tensors.values()))


def naive(tensors, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, circular=False):
    axes = tensors["query"].dim() - 3

    def each(value):
        return (value,) * axes if isinstance(value, int) else tuple(value)

    scale = tensors["query"].shape[-1] ** -0.5 if scale is None else scale
    arguments = (each(kernel_size), each(stride), each(dilation), each(is_causal), scale)
    outs = definition.neighborhood_attention(
        Arguments(*(tensors[name] for name in ARGUMENTS[:3]), *arguments, *map(tensors.get, ARGUMENTS[3:]), circular)
    )
    return outs, gradients(outs, list(tensors.values()))


def check(tensors, window, *choices, dtype=None):
    """Compare with the definition in float64; the dtype is float32 for the compiled kernel, else float64."""
    outs, grads = naive(tensors, **window)
    for choice in choices:
        with choose(choice):
            ours, our_grads = run(cast(tensors, dtype or (torch.float32 if choice == "cpu" else torch.float64)), window)
        assert_close(ours[0], outs[0], f"{choice}, output")
        assert_close(ours[1], outs[1], f"{choice}, log-sum-exp")
        assert_gradients_close(our_grads, grads)

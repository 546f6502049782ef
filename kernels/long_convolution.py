"""Convolution along a sequence with a kernel as long as the sequence, by Fourier transforms.

An op of the cheap kind, in PyTorch, so that autocast does not round its spectra. `long_convolution` checks what it is
given; mixers call `long_convolution_op`, which checks nothing: it scripts, traces and exports.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from visionmix.kernels import dispatch
from visionmix.kernels.checks import check_shape, check_sizes, check_tensors
from visionmix.kernels.registration import register_reference_op


def long_convolution(x: Tensor, kernel: Tensor, reverse: Tensor | None = None) -> Tensor:
    """Convolve every channel with a kernel of its own over the tokens before it, and with another over those after it.

        y_i = sum_(j <= i) kernel_(i - j) x_j + sum_(j > i) reverse_(j - i - 1) x_j

    The product of spectra of twice the length, which Monarch matrices give (Fu et al., 2023, Monarch Mixer, arXiv
    2310.12109); here they are those of PyTorch's fast Fourier transform. An exported graph, which must serve every
    length on every runtime, holds the sum itself.

    Args:
        x: sequences (batch, length, channels), of any floating-point dtype.
        kernel: (length, channels).
        reverse: (length, channels); None for zeros.

    Returns:
        The output (batch, length, channels) in float32, or float64 if any input is; so is the computation.

    Raises:
        TypeError: an argument is not a real floating-point tensor.
        ValueError: shapes or devices do not fit together, or an axis but the batch is empty.
    """
    ranks = {"x": (3,), "kernel": (2,), "reverse": (2,)}
    check_tensors({"x": x, "kernel": kernel, "reverse": reverse}, ranks, ("x", "kernel"))
    check_sizes("x", x)
    axes = {"length": x.shape[1], "channels": x.shape[2]}
    check_shape("kernel", kernel, axes)
    check_shape("reverse", reverse, axes)
    return long_convolution_op(x, kernel, reverse)


def long_convolution_op(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    """Return what `long_convolution` does, without its checks."""
    if not torch.jit.is_scripting():  # alone: TorchScript compiles both sides of an `and`
        if dispatch.bypassed():
            return dispatch.call_reference(_reference, (x, kernel, reverse))
    return torch.ops.visionmix.long_convolution(x, kernel, reverse)


def _reference(arguments: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    return _summed(*arguments) if torch.compiler.is_exporting() else _forward(*arguments)


def _forward(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    dtype, length = dispatch.compute_dtype(x, kernel, reverse), x.shape[1]
    # Sequences side by side in memory: a transform along a strided axis takes half as long again.
    x, kernel = x.to(dtype).transpose(1, 2).contiguous(), kernel.to(dtype).t().contiguous()
    if reverse is not None:
        kernel = torch.cat([kernel, reverse.to(dtype).t().flip(1)], dim=1)
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2).contiguous()


def _summed(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    dtype, length = dispatch.compute_dtype(x, kernel, reverse), x.shape[1]
    x, taps = x.to(dtype).transpose(1, 2), kernel.to(dtype).t().flip(1)
    if reverse is not None:
        taps = torch.cat([taps, reverse.to(dtype).t()], dim=1)
    x = F.pad(x, [length - 1, 0 if reverse is None else length])
    return F.conv1d(x, taps.unsqueeze(1), groups=taps.shape[0])[..., :length].transpose(1, 2)


def _fake(x: Tensor, kernel: Tensor, reverse: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=dispatch.compute_dtype(x, kernel, reverse))


def _flops(x, kernel, reverse) -> int:
    """Transforms of twice the length, `5 n log2 n / 2` each for real numbers, and the product of the spectra."""
    batch, length, channels = x
    transform = 5 * length * math.log2(2 * length)
    return round(channels * ((2 * batch + 1) * transform + 6 * batch * (length + 1)))


register_reference_op(
    "long_convolution", "(Tensor x, Tensor kernel, Tensor? reverse=None) -> Tensor", _forward, _flops, _fake
)

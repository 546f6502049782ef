"""Products of tiles in Triton, of operands in a type and at a precision that the caller's constants name."""

import triton
import triton.language as tl

from visionmix.kernels.gpu import interpreting

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of zeros, float32. Triton 3.5 takes a named tuple's field as an argument, but not inside a tuple."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def round_to_bfloat16(b_x):
    """Round to bfloat16; in float32 where it is interpreted, which neither rounds to the nearest nor multiplies it."""
    if INTERPRETED:
        b_bits = b_x.to(tl.float32).to(tl.int32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_x = (b_bits & -65536).to(tl.float32, bitcast=True)
    else:
        b_x = b_x.to(tl.bfloat16)
    return b_x


@triton.jit
def operand(b_x, products: tl.constexpr):
    """Round to `products.TYPE`; in float32 where it is interpreted."""
    if products.TYPE.is_bf16():
        b_x = round_to_bfloat16(b_x)
    else:
        b_x = b_x.to(products.TYPE)
        if INTERPRETED:
            b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def dot(b_x, b_y, products: tl.constexpr):
    """The float32 product of two tiles, of operands in `products.TYPE` and at `products.PRECISION`."""
    return tl.dot(operand(b_x, products), operand(b_y, products), input_precision=products.PRECISION)

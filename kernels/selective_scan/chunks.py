"""How the Triton kernels of the selective scan cut a sequence; to know it, Triton itself is not needed."""

from torch import Tensor

CHUNK = 256


def entering_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """Return the shape of the states entering the chunks and of the last: (batch, chunks + 1, states, dim)."""
    batch, dim, length = u.shape
    return batch, (length + CHUNK - 1) // CHUNK + 1, A.shape[1], dim

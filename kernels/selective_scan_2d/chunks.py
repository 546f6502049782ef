"""How the Triton kernels of the selective scan of a map cut an order; to know it, Triton itself is not needed."""

from torch import Tensor

CHUNK = 16


def entering_shape(x: Tensor, A: Tensor, steps: int) -> tuple[int, ...]:
    """Return the shape of the states entering the chunks of each order, which are kept for the backward pass.

    `steps` are those of the longest order; (batch, orders * chunks * states * channels), since a graph with an axis of
    chunks would serve either one chunk or more.
    """
    orders, channels, states = A.shape
    return x.shape[0], orders * ((steps + CHUNK - 1) // CHUNK) * states * channels

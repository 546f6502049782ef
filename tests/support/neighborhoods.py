"""The tensors that neighborhood attention takes."""

from collections.abc import Callable, Sequence

from torch import Tensor


def named_tensors(
    random: Callable[..., Tensor],
    grid: Sequence[int],
    kernel_size: Sequence[int],
    *,
    heads: int,
    key_heads: int,
    dim: int,
    value_dim: int,
    extra: int,
    bias: bool,
    batch: int,
) -> dict[str, Tensor]:
    """Return the tensor arguments by name, each made by `random(*shape)`; `extra` additional keys, and a `bias`."""
    tensors = {
        "query": random(batch, *grid, heads, dim),
        "key": random(batch, *grid, key_heads, dim),
        "value": random(batch, *grid, key_heads, value_dim),
    }
    if extra:
        tensors["additional_keys"] = random(batch, extra, key_heads, dim)
        tensors["additional_values"] = random(batch, extra, key_heads, value_dim)
    if bias:
        tensors["relative_position_bias"] = random(heads, *(2 * k - 1 for k in kernel_size))
    return tensors

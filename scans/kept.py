"""Scan orders of what is left of a grid."""

import torch


def kept_steps(inverses: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the steps that K orders of a grid take over some of its cells, in every image others.

    A cell keeps its place in an order: those that are kept are read in the sequence of the whole grid's steps, and
    between two of them lie as many places as the order has steps there, padded ones among them. So
    `visionmix.kernels.selective_scan_2d` takes them.

    Args:
        inverses: int64 (K, cells), `order(...).inverse` of each order, which reads a cell once at most.
        kept: int64 (batch, tokens), the cell of each token that is kept, no cell twice.

    Returns:
        int64 (batch, K, tokens), the token read at each step, -1 for padded steps at the end, of tokens whose cell the
        order does not read; and int64 (batch, K, tokens), the places that are passed over before each step.

    Raises:
        TypeError: `inverses` or `kept` is no tensor of int64.
        ValueError: one has another number of axes, or `kept` names no cell of the grid, or one twice. Cells are looked
            at on a CPU, outside graphs.
    """
    for argument, value in (("inverses", inverses), ("kept", kept)):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
            raise TypeError(f"{argument} is {getattr(value, 'dtype', type(value).__name__)}; give a tensor of int64")
        if value.ndim != 2:
            raise ValueError(f"{argument} has {value.ndim} axes; give (K, cells) and (batch, tokens)")
    looked_at = kept.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    cells = inverses.shape[1]
    if looked_at and kept.numel() and not (int(kept.min()) >= 0 and int(kept.max()) < cells):
        raise ValueError(
            f"kept has cells from {int(kept.min())} to {int(kept.max())} and the grid {cells}; give cells from 0 to "
            f"{cells - 1}"
        )
    steps, gaps = steps_of(inverses, kept)
    if looked_at and (gaps < 0).any():
        raise ValueError("kept has a cell twice; give each cell of an image once at most")
    return steps, gaps


def steps_of(inverses: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `kept_steps` does, of arguments that are known to be right."""
    steps = inverses[:, kept].transpose(0, 1)
    unread = torch.iinfo(steps.dtype).max
    steps, tokens = torch.where(steps < 0, unread, steps).sort(dim=2)
    read = steps < unread
    before = torch.cat([torch.full_like(steps[..., :1], -1), steps[..., :-1]], dim=2)
    return torch.where(read, tokens, -1), torch.where(read, steps - before - 1, 0)

"""PyTorch references for exported graphs whose sizes are symbols, where no loop may depend on a length.

The references proper cut a length into chunks and loop over them, as Python numbers. A graph that serves every length
has one loop with as many rounds as the longest sequence needs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# An exported scan serves sequences of up to 2 ** _ROUNDS tokens.
_ROUNDS = 20


def is_exported() -> bool:
    """Return whether a graph is being made for a file: a program of torch.export, or a trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def numbers(*sizes: int) -> list[int]:
    """Return the sizes, as numbers where a trace has tensors in their place."""
    return [int(size) for size in sizes] if torch.jit.is_tracing() else list(sizes)


def is_symbolic(*sizes: int) -> bool:
    """Return whether a graph is being exported in which one of the sizes is a symbol."""
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def scan_states(decay: Tensor, added: Tensor) -> Tensor:
    """Return all states of `h_t = decay_t h_(t-1) + added_t` along axis 1, from h_0 = 0, by doubling.

    `decay` broadcasts to `added` after axis 1. After round i each place holds the effect of the 2^i steps up to it on
    the state before them (Hillis and Steele, 1986, Data Parallel Algorithms).
    """
    # A row of zeros in front is what places read that have fewer steps before them, as state and as decay: from there
    # on their state is whole.
    place = torch.arange(added.shape[1] + 1, device=added.device)
    added, decay = (F.pad(x, [0, 0] * (x.dim() - 2) + [1, 0]) for x in (added, decay))
    for round_number in range(_ROUNDS):
        earlier = (place - (1 << round_number)).clamp(min=0)
        added = torch.addcmul(added, decay, added.index_select(1, earlier))
        decay = decay * decay.index_select(1, earlier)
    return added[:, 1:]

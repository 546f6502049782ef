"""Feed-forwards that differ from timm's only in how their hidden width is chosen."""

import torch
from timm.layers import GluMlp
from torch import nn


def swiglu(
    dim: int,
    *,
    mlp_ratio: float = 4.0,
    multiple_of: int = 256,
    drop: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GluMlp:
    """Return a gated feed-forward ``fc2(silu(a) * b)`` with ``a, b = fc1(x).chunk(2, dim=-1)`` and no biases.

    The hidden width is two thirds of ``dim * mlp_ratio``, so that the parameters number what an ungated feed-forward of
    that ratio has, rounded up to `multiple_of`.

    Shapes: (..., dim) to (..., dim).

    Source: GLU variants (Shazeer 2020, arXiv 2002.05202).

    Args:
        dim: Channels.
        mlp_ratio: Hidden width over `dim` of the ungated feed-forward with as many parameters.
        multiple_of: What the hidden width is rounded up to.
        drop: Dropout rate after the gate and after the last projection.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """
    hidden = -(-int(dim * mlp_ratio * 2 / 3) // multiple_of) * multiple_of
    return GluMlp(
        dim, 2 * hidden, act_layer=nn.SiLU, bias=False, drop=drop, gate_last=False, device=device, dtype=dtype
    )

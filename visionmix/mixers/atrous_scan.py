"""Selective scans through atrous windows."""

import torch

from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.registry import register_mixer


@register_mixer("atrous_scan")
class AtrousScan(CrossScan):
    """`CrossScan` through windows whose cells lie `rate` rows and columns apart.

    The directions are those of the scan order ``atrous_window_<window>_<rate>`` (see `visionmix.scans`): the order, its
    transpose and the reverses of both.

    Shapes and errors are those of `CrossScan`.

    Source: AtrousMamba (Wang et al. 2025, arXiv 2507.16172), which has no public code. From the paper: a selective scan
    in windows sampled at adjustable atrous rates, which bring far cells close in the sequence and near ones into it.
    Decided here: all else as in VMamba, the order of the windows, and four directions.

    Args:
        dim: Channels.
        window: Rows and columns of a window, in cells.
        rate: Rows and columns from one cell of a window to the next.
        expand: Channels of the scan over `dim`.
        d_state: States a channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        order: Another scan order or set of directions in place of the atrous windows; None for these.
        device: Where the parameters lie.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        window: int = 7,
        rate: int = 2,
        expand: float = 1.0,
        d_state: int = 1,
        dt_rank: int | None = None,
        order: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        order = f"atrous_window_{window}_{rate}" if order is None else order
        super().__init__(dim, expand, d_state, dt_rank, order=order, device=device, dtype=dtype)

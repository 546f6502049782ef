"""Selective scans through atrous windows."""

from typing import Any

from visionmix.mixers.cross_scan import CrossScan
from visionmix.mixers.registry import register_mixer


@register_mixer("atrous_scan")
class AtrousScan(CrossScan):
    """`CrossScan` through windows whose cells lie `rate` rows and columns apart.

    The directions are those of the scan order ``atrous_window_<window>_<rate>`` (see `visionmix.scans`): the order, its
    transpose and the reverses of both.

    Shapes and errors are those of `CrossScan`.

    Source: AtrousMamba (Wang et al. 2025, arXiv 2507.16172), which has no public code. From the paper: a selective scan
    in windows sampled at adjustable atrous rates, which bring distant cells close together in the sequence.
    Decided here: all else as in VMamba, the order of the windows, and four directions.

    Args:
        dim: Channels.
        window: Rows and columns of a window, in cells.
        rate: Rows and columns from one cell of a window to the next.
        expand: Channels of the scan over `dim`.
        d_state: States per channel.
        dt_rank: Rank of the step sizes' projection; None for ``ceil(dim / 16)``.
        order: A scan order or set of directions that replaces the atrous windows; None for the windows.
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
        **dd: Any,
    ) -> None:
        order = f"atrous_window_{window}_{rate}" if order is None else order
        super().__init__(dim, expand, d_state, dt_rank, order=order, **dd)

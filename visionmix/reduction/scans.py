"""What methods need of a model of scans."""

from collections.abc import Sequence

from torch import nn

from visionmix.backbones.block import Block, TokenBlock
from visionmix.reduction.attention import check_reads_tokens


def check_scans(name: str, blocks: Sequence[nn.Module], prefix_positions: tuple[int, ...]) -> None:
    """Refuse blocks that the method `name` cannot look into.

    Raises:
        TypeError: a block's mixer shows no scans, or a part of it reads the whole map.
        ValueError: there are several prefix tokens, or a mixer reads cells in another order than row by row.
    """
    if len(prefix_positions) > 1:
        raise ValueError(f"method {name!r} knows one class token; this model has {len(prefix_positions)}")
    for block in blocks:
        own = type(block).forward in (Block.forward, TokenBlock.forward)
        if not own or not hasattr(block.mixer, "directions"):
            what = type(getattr(block, "mixer", block)).__qualname__
            raise TypeError(
                f"method {name!r} looks into selective scans, and a {what} shows none (it has no method directions); "
                "take a model with the mixer 'bidirectional_mamba'"
            )
        check_reads_tokens(block)
        if not block.mixer.in_raster:
            raise ValueError(
                f"order={block.mixer.order!r}: method {name!r} reads sequences of rows; give the mixer order='raster'"
            )

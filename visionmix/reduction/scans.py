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
        if not own or not scans_sequences(block):
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


def check_map_scans(name: str, blocks: Sequence[nn.Module]) -> None:
    """Refuse blocks that the method `name` cannot run on some of a map's tokens.

    Raises:
        TypeError: a block's mixer has no scans of such tokens, or a part of it reads the whole map.
    """
    for block in blocks:
        own = type(block).forward is Block.forward
        if not own or not hasattr(block.mixer, "scan_kept"):
            what = type(block.mixer if own else block).__qualname__
            raise TypeError(
                f"method {name!r} runs selective scans on some of a map's tokens, and a {what} cannot; give numbers of "
                "later blocks as layers, or take a model with the mixer 'bidirectional_mamba', 'plain_scan' or "
                "'cross_scan'"
            )
        check_reads_tokens(block)


def scans_sequences(block: nn.Module) -> bool:
    """Return whether the mixer of `block` shows the scans of a sequence, as Vim's does."""
    return hasattr(getattr(block, "mixer", None), "directions")

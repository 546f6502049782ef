"""Merging inside windows, then over the whole map, for dense prediction."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from visionmix.kernels.dispatch import full_precision
from visionmix.layers import at_least_float32
from visionmix.reduction.attention import attention_block, check_attention, mask_bias
from visionmix.reduction.methods import Method, chosen_layers, register_method
from visionmix.reduction.tokens import Tokens, argsorted, merge, ones
from visionmix.registry import is_int, is_number

_NEVER = -2.0  # less than any cosine


@register_method("algm")
class ALGM(Method):
    """Merge windows of like tokens in one block, then like tokens anywhere in later ones, after their attention.

    In the first of `layers`, the cells are cut into windows of `window_size` by `window_size`. A window whose tokens
    have a mean cosine of at least `threshold`, over all pairs, becomes one token. In the others, tokens at even
    positions are set A, those at odd positions set B, and each token of A whose best cosine with one of B is at least
    ``mean + std / l``, over the best cosines of A, with l the block's number counted from 1, is merged into it. Merged
    tokens are means weighted by sizes. Merged windows come first, in falling order of likeness, then the other tokens.

    Each image merges as many as it has: shorter sequences are padded at their end (`Tokens.mask`), and an image's
    result does not depend on the others of its batch. The published code merges in all images as many as the image that
    has fewest, by a threshold that is a mean over the batch; `released` does the same. The number of tokens depends on
    the images, so the model does not compile to one graph.

    Dense maps (``forward_intermediates``, ``features_only``) give every cell the value of its token, so a head of
    segmentation needs no change. Nothing is trained, but the published accuracies are those of models trained with the
    method.

    Source: ALGM (Norouzi et al. 2024, arXiv 2406.09936).

    Args:
        blocks: The model's blocks.
        prefix_positions: Its prefix tokens; they are never merged.
        layers: Numbers of the blocks, from 0, rising; None for the first and the fifth, as in the published ViT-S.
        threshold: Mean cosine of the windows that are merged.
        window_size: Rows and columns of a window; cells beyond the last whole one are left alone.
        released: Whether the images of a batch share thresholds and numbers, as in the published code.
        trace_source: Whether every pass follows which token holds which cell.

    Raises:
        TypeError: an option is of another type, or a block has no readable attention.
        ValueError: a number is out of range, or numbers of blocks do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        prefix_positions: tuple[int, ...],
        *,
        layers: Sequence[int] | None = None,
        threshold: float = 0.88,
        window_size: int = 2,
        released: bool = False,
        trace_source: bool = False,
    ) -> None:
        depth = len(blocks)
        self.layers = chosen_layers(sorted({0, min(4, depth - 1)}) if layers is None else layers, depth)
        if not is_number(threshold):
            raise TypeError(f"threshold={threshold!r}: give a cosine")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: give a cosine, from -1 to 1")
        if not is_int(window_size):
            raise TypeError(f"window_size={window_size!r}: give a number of cells")
        if window_size < 2:
            raise ValueError(f"window_size={window_size}: give 2 or more")
        self.threshold = threshold
        self.window_size = window_size
        self.released = released
        self.trace_source = trace_source
        check_attention(self.name, blocks, prefix_positions)

    def step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        parts = attention_block(block)
        tokens = tokens._replace(x=parts.attention(tokens.x, mask_bias(tokens)).x)
        if index in self.layers and len(tokens.x):
            x = at_least_float32(tokens.x.detach())
            if index == min(self.layers):
                tokens = self._merged_windows(tokens, x)
            elif tokens.x.shape[1] - len(tokens.prefix_positions) > 1:
                tokens = self._merged_pairs(tokens, x, index + 1)
        return tokens._replace(x=parts.feed_forward(tokens.x))

    def _merged_windows(self, tokens: Tokens, x: Tensor) -> Tokens:
        prefix, side = len(tokens.prefix_positions), self.window_size
        (rows, columns), area = tokens.grid, self.window_size**2
        if x.shape[1] != prefix + rows * columns:
            raise ValueError(
                f"method 'algm' needs a token for each of {rows}x{columns} cells, and {x.shape[1] - prefix} are left; "
                f"build the model with patch_drop_rate=0"
            )
        if min(rows, columns) < side:
            return tokens
        cells = torch.arange(rows * columns, device=x.device).reshape(rows, columns)
        whole = cells[: rows // side * side, : columns // side * side]
        windows = whole.unfold(0, side, side).unfold(1, side, side).reshape(-1, area)
        unit = normalize(x[:, prefix:], dim=2)
        total = unit[:, windows.flatten()].unflatten(1, (-1, area)).sum(dim=2)
        like = (total.square().sum(dim=2) - area) / (area * (area - 1))
        merges = like >= self.threshold
        ranked = argsorted(like)
        rank = ranked.argsort(dim=1)
        if self.released:
            merges = rank < merges.sum(dim=1).min()
        count = merges.sum(dim=1, keepdim=True)
        inside = torch.zeros(x.shape[0], rows * columns, dtype=torch.bool, device=x.device)
        inside[:, windows.flatten()] = merges.repeat_interleave(area, dim=1)
        target = count + (~inside).cumsum(dim=1) - 1
        target[:, windows.flatten()] = torch.where(
            merges.repeat_interleave(area, dim=1), rank.repeat_interleave(area, dim=1), target[:, windows.flatten()]
        )
        places = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        return _padded(tokens, torch.cat([places, prefix + target], dim=1))

    def _merged_pairs(self, tokens: Tokens, x: Tensor, number: int) -> Tokens:
        prefix = len(tokens.prefix_positions)
        there = torch.ones_like(x[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask
        free = there.clone()
        free[:, :prefix] = False
        with full_precision(x.device):
            unit = normalize(x, dim=2)
            cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        cosine = cosine.masked_fill(~free[:, ::2].unsqueeze(2) | ~free[:, 1::2].unsqueeze(1), _NEVER)
        best, partner = cosine.max(dim=2)
        counted = best > _NEVER
        numbers = counted.sum(dim=1, keepdim=True).clamp(min=2)
        mean = (best * counted).sum(dim=1, keepdim=True) / numbers
        deviation = (((best - mean) * counted).square().sum(dim=1, keepdim=True) / (numbers - 1)).sqrt()
        if self.released:
            mean, deviation = mean.mean(), deviation.mean()
        merges = counted & (best >= mean + deviation / number)
        if self.released:
            merges = argsorted(best).argsort(dim=1) < merges.sum(dim=1).min()
        gone = torch.zeros_like(there)
        gone[:, ::2] = merges
        group = torch.arange(x.shape[1], device=x.device) % 2 + 2 * (gone | ~there)
        target = argsorted(group, descending=False).argsort(dim=1)
        target[:, ::2] = torch.where(merges, target[:, 1::2].gather(1, partner), target[:, ::2])
        return _padded(tokens, target, there)


def _padded(tokens: Tokens, target: Tensor, there: Tensor | None = None) -> Tokens:
    """Return tokens merged by `target`, int64 (batch, tokens), at whose end shorter sequences are padded.

    `there` says which of them are no padding, bool (batch, tokens); None for all.
    """
    last = target if there is None else target.masked_fill(~there, -1)
    lengths = last.amax(dim=1, keepdim=True) + 1
    count = int(lengths.max())
    size = ones(tokens.x) if tokens.size is None else tokens.size
    if there is not None:  # padding goes wherever there is room, without weight
        target, size = target.clamp(max=count - 1), size * there.unsqueeze(2)
    mask = torch.arange(count, device=target.device) < lengths
    merged = merge(tokens._replace(size=size), target, count)
    return merged._replace(mask=None if bool(mask.all()) else mask)

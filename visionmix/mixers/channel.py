"""Softmax attention between channels: the second of DaViT's two mixers."""

from typing import Any, Final

from torch import Tensor, nn

from visionmix.layers import Grid, SequenceMixer, at_least_float32
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import check_heads

_SCALES = ("head_dim", "tokens")


@register_mixer("channel")
class ChannelAttention(SequenceMixer):
    """Attention whose tokens are the channels of a group, each described by its values in all cells.

    With ``q, k, v = W x`` (tokens, head_dim) in each group,

        out = W_o (softmax(scale k^T v) q^T)^T                                 (scale="head_dim": head_dim^-0.5)
            = W_o (softmax(scale q^T k) v^T)^T                                 (scale="tokens": tokens^-0.5)

    The scores are of channels with channels, so that every cell's result depends on the whole map, in a time linear in
    its cells. Scores are computed in float32 at least.

    DaViT's dual attention is blocks of windows and of channels in turns:
    ``mixer=dict(cycle=["window", "channel"])``.

    Shapes: (batch, height, width, dim) to the same, for every height and width; `forward_tokens` takes sequences
    (batch, tokens, dim).

    Source: DaViT (Ding et al. 2022, arXiv 2204.03645), whose published order of q, k and v is the first line's;
    ``scale="tokens"``, whose scores do not grow with the map, is that of its later, larger models (Florence-2, Xiao et
    al. 2023, arXiv 2311.06242).

    Args:
        dim: Channels.
        num_heads: Groups of channels; a divisor of `dim`.
        scale: "head_dim" or "tokens".
        qkv_bias: Whether the projection to q, k and v has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `scale` is unknown.
    """

    by_tokens: Final[bool]

    def __init__(self, dim: int, num_heads: int = 3, scale: str = "head_dim", qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if scale not in _SCALES:
            raise ValueError(f"scale={scale!r} is unknown; give one of {', '.join(map(repr, _SCALES))}")
        self.num_heads = num_heads
        self.by_tokens = scale == "tokens"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the mixed tokens (batch, tokens, dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if not self.by_tokens:
            q, k, v = k, v, q
        count = x.shape[1]
        # Autocast's products are means over the tokens, which half precision can hold.
        share = count**-0.5
        products = (at_least_float32(q) * share).transpose(2, 3) @ (at_least_float32(k) * share)
        scale = count**0.5 if self.by_tokens else count * q.shape[-1] ** -0.5
        scores = (at_least_float32(products) * scale).softmax(dim=-1)
        y = v @ scores.transpose(2, 3).to(v.dtype)
        return self.proj(y.transpose(1, 2).flatten(2))

"""DualToken-ViT's mixer: attention to a small map of the image, joined with tokens that a model carries along."""

from typing import Any

from timm.layers import LayerNorm, use_fused_attn
from torch import Tensor, nn

from visionmix.layers import mlp
from visionmix.layers.maps import pool_map
from visionmix.mixers.registry import register_mixer
from visionmix.mixers.softmax import DotProductAttention, SoftmaxAttention, check_heads


@register_mixer("dual_token")
class DualTokenAttention(nn.Module):
    """Attention of every cell to a square of global tokens, which the map's own summary enriches.

        s    = the map x after steps times s = pool(s + depthwise3x3(s)), averaged to side x side cells
        a    = softmax attention of s to itself
        g    = share a + (1 - share) (g + mlp(norm(g)))
        out  = W_o softmax(q k^T * head_dim^-0.5) v,    q = W_q x,  k, v = W_kv norm(g)

    pool averages 2x2 cells; of an odd side, windows of adaptive pooling, half as many as cells, rounded up. The
    ``side * side`` tokens g, in raster order, come from outside, and `with_tokens` returns them as they are after the
    mixer: a model hands them from block to block. Without any, they are zeros.

    Shapes: (batch, height, width, dim) to the same, for every height and width; tokens (batch, side * side, dim).

    Source: DualToken-ViT (Chu et al. 2023, arXiv 2309.12424), its position-aware token module. From the paper are its
    four steps, the number of tokens and the weighted sum; the layers inside are decided here.

    Args:
        dim: Channels.
        num_heads: Heads of both attentions; a divisor of `dim`.
        steps: How often the map is halved, each time after a convolution.
        side: Rows and columns of the global tokens.
        share: Weight of the map's summary in the sum, from 0 to 1.
        qkv_bias: Whether the projections to q, k and v have biases.

    Raises:
        ValueError: `num_heads` does not divide `dim`, `steps` is negative, `side` is below 1 or `share` no share.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 3,
        steps: int = 1,
        side: int = 7,
        share: float = 0.5,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if steps < 0:
            raise ValueError(f"steps={steps} is negative; give 0 or more")
        if side < 1:
            raise ValueError(f"side={side} is too small; give 1 or more")
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is no share; give a number from 0 to 1")
        self.num_heads, self.side, self.share = num_heads, side, share
        self.fused_attn = use_fused_attn()
        self.dot_product = DotProductAttention()
        convs = [nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, **dd) for _ in range(steps)]
        self.convs = nn.ModuleList(convs)
        self.attn = SoftmaxAttention(dim, num_heads, qkv_bias, **dd)
        self.mlp_norm = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp(dim, mlp_ratio=1.0, **dd)
        self.norm = LayerNorm(dim, eps=1e-6, **dd)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.new_zeros([x.shape[0], self.side * self.side, x.shape[3]])
        return self.with_tokens(x, tokens)[0]

    def with_tokens(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map and the enriched global tokens.

        Args:
            x: The map (batch, height, width, dim).
            tokens: The global tokens (batch, side * side, dim).
        """
        _, height, width, _ = x.shape
        summary, rows, columns = x, height, width
        for conv in self.convs:
            summary = summary + conv(summary.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
            summary = pool_map(summary, rows, columns)
        summary = self.attn(pool_map(summary, self.side, self.side)).flatten(1, 2)
        tokens = self.share * summary + (1.0 - self.share) * (tokens + self.mlp(self.mlp_norm(tokens)))
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm(tokens)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.dot_product(q, k, v, None, self.fused_attn)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (height, width))), tokens

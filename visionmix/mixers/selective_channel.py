"""A selective scan along the channels of each cell: ViM2's channel mixer."""

from typing import Any

import torch
from torch import Tensor, nn

from visionmix.layers import Grid
from visionmix.mixers.bidirectional_mamba import BidirectionalMamba
from visionmix.mixers.registry import register_mixer


@register_mixer("selective_channel")
class SelectiveChannel(nn.Module):
    """The channels of each cell as a sequence, scanned from both ends, then a projection of them all.

    With m the gated scans of `visionmix.mixers.BidirectionalMamba`, along the channels, of a sequence with one number a
    step, which it widens to `features`:

        out = W m(x) + b

    It mixes channels, and no cells: it stands beside a token mixer, in the place of a feed-forward.

    Shapes: (batch, height, width, dim) to the same, for every height and width.

    Source: MambaMixer (Behrouz et al. 2024, arXiv 2403.19888), which has no public code. From it are the bidirectional
    selective scan along the channels, a causal convolution in front of each direction and the gate. Its linear layers
    act along the cells, so that their weights fit one image size alone. Decided here: each cell's channels are a
    sequence of their own, with few features, and W joins the channels behind the scan.

    Args:
        dim: Channels.
        features: Numbers that a channel is widened to for the scans.
        d_state: States per feature.
        d_conv: Channels that the causal convolutions see.

    Raises:
        ValueError: `features`, `d_state` or `d_conv` is below 1.
    """

    def __init__(self, dim: int, features: int = 2, d_state: int = 16, d_conv: int = 4, **dd: Any) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features={features} leaves nothing to scan; give 1 or more")
        self.scan = BidirectionalMamba(1, expand=features, d_state=d_state, d_conv=d_conv, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Initialise the layers of one input as `nn.Linear` does: with a deviation of 0.02 they would let little by."""
        self.scan.in_proj.reset_parameters()
        self.scan.proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        channels = x.reshape(batch * height * width, dim, 1)
        return self.proj(self.scan.forward_tokens(channels, Grid(1, dim, [], None)).reshape(batch, height, width, dim))

"""ViM2: selective scans of the cells, then of the channels, each fed by all earlier outputs of its stage.

Source: MambaMixer (Behrouz et al. 2024, arXiv 2403.19888), which has neither public code nor weights. From the paper:
VMamba's pipeline of four stages; token mixers that scan in four directions, with a gate and twice the channels, two for
each channel mixer; inputs that are weighted sums of all earlier outputs of the stage. Decided here: the token mixers,
the stem and the downsamplers are those of VMamba's first version, which the paper builds on; a sum begins as the latest
output alone, and counts the stage's input once, where the paper's formula counts it twice; channel mixers see one cell
each (see the mixer). The paper's table has 18 token mixers in the third stage of the small and the base model, which
would make 36 and 61 million parameters; 24 make the numbers that it prints. The mixers are
`visionmix.mixers.CrossScan` and `visionmix.mixers.SelectiveChannel`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones.hierarchical import Stage
from visionmix.models import Layout, Variant, register_family
from visionmix.models.hosts.vmamba import vmamba


class EarlierOutputs(nn.Module):
    """A sum of maps with a learned weight each, ``sum_i w_i y_i``, at first the last map alone.

    Shapes: `count` maps (batch, height, width, dim) to one.

    Source: MambaMixer (Behrouz et al. 2024, arXiv 2403.19888).

    Args:
        count: Number of maps.
    """

    def __init__(self, count: int, **dd: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, **dd))
        self.init_layer_weights()

    @torch.jit.ignore
    def init_layer_weights(self) -> None:
        """Set the weight of the last map to 1, the others to 0."""
        with torch.no_grad():
            self.weight.zero_()
            self.weight[-1:].fill_(1.0)

    def forward(self, maps: list[Tensor]) -> Tensor:
        total = maps[0] * self.weight[0]
        for index in range(1, len(maps)):
            total = torch.addcmul(total, maps[index], self.weight[index])
        return total


class AveragingStage(Stage):
    """A stage whose every block reads a weighted sum of the stage's input and of the outputs of the blocks before it.

    Shapes, arguments: those of `visionmix.backbones.hierarchical.Stage`.

    Source: MambaMixer (Behrouz et al. 2024, arXiv 2403.19888).
    """

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module], **layers: nn.Module | None) -> None:
        super().__init__(downsample, blocks, **layers)
        like = next(value for block in blocks for value in block.parameters())
        dd = {"device": like.device, "dtype": like.dtype}
        self.sums = nn.ModuleList([EarlierOutputs(index + 1, **dd) for index in range(len(blocks))])

    def forward(self, x: Tensor, carry: list[Tensor] | None = None) -> Tensor:
        x = self.pos_embed(self.downsample(x))
        outputs = [x]
        for earlier, block in zip(self.sums, self.blocks):  # noqa: B905 TorchScript knows no strict=
            x = earlier(outputs)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            outputs.append(x)
        return self.norm(x)


_TOKENS = {"name": "cross_scan", "expand": 2.0, "d_state": 16, "gate": True, "conv_bias": True}
_MIXERS = {"cycle": [_TOKENS, _TOKENS, "selective_channel"]}


def _layout(dim: int, third: int, **options: Any) -> Layout:
    layers = {"patch_merging": True, "mlp_layer": None, "stage_layer": AveragingStage}
    return vmamba(dim, (3, 3, third, 3), [_MIXERS] * 4, **layers, **options)


# The accuracies that the paper prints, 82.7, 83.7 and 83.9 %, are of weights that were never published.
VARIANTS = {
    "vim2_tiny": Variant(_layout(96, 9), params=20),
    "vim2_small": Variant(_layout(96, 36), params=43),
    "vim2_base": Variant(_layout(128, 36), params=74),
    "test_vim2": Variant(_layout(8, 1, img_size=96).with_options(depths=(1, 3, 1, 1))),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2403.19888",
    paper_name="MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection",
)

"""RaftMLP: MLPs along the columns, along the rows and over the channels, after patches of several sizes.

Source: RaftMLP (Tatsunami and Taki 2021, arXiv 2108.04384). The mixer is `visionmix.mixers.RaftMixing`. Its layers are
those of 224-pixel images whatever `img_size` is, and maps of other sizes are resampled to them and back; to train at
another size without, give each stage's ``mixer=[dict(name="raft", grid_size=...), ...]``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionmix.backbones import Hierarchical
from visionmix.backbones.block import Maker, Residual, placed
from visionmix.layers import MultiScalePatches, mlp, resample_map
from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import doubled

_RAFT_SIZE = 2


class RaftBlock(nn.Module):
    """Columns, rows and channels in turn, each ``x = x + mlp(norm(x))``.

    The first two work at the size that their mixers are built at. A map of another size is resampled to it before them,
    residual included, and back after them (bicubic).

    Shapes: (batch, height, width, dim) to the same.

    Args:
        dim: Channels.
        mixer: Makes `visionmix.mixers.RaftMixing`.
        mlp_layer: Makes the feed-forward from `dim`.
        norm_layer: Makes a norm over channels from `dim`.
        **options: `drop_path` and `layer_scale` of `visionmix.backbones.Residual`, for each branch.
    """

    def __init__(self, dim: int, *, mixer: Maker, mlp_layer: Maker, norm_layer: Maker, **options: Any) -> None:
        super().__init__()
        dd = placed(options)
        self.norm1, self.norm2, self.norm3 = (norm_layer(dim, **dd) for _ in range(3))
        self.scale1, self.scale2, self.scale3 = (Residual(dim, **options) for _ in range(3))
        self.vertical, self.horizontal = mixer(axis="vertical"), mixer(axis="horizontal")
        self.mlp = mlp_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = resample_map(x, self.vertical.rows, self.vertical.columns)
        x = self.scale1(x, self.vertical.mix(self.norm1(x)))
        x = self.scale2(x, self.horizontal.mix(self.norm2(x)))
        x = resample_map(x, height, width)
        return self.scale3(x, self.mlp(self.norm3(x)))


# Each level's embedding, by the widths of its patches over the smallest.
_SCALES = ((1, 2), (1, 2), (1, 2), (1,))


def _laid_out(key: str, tensor: Tensor) -> Tensor:
    """Return a published tensor with its axes in the order that they have here.

    An embedding reads (size, channel, pixel), here (channel, size and pixel). The norms before the rafts read channels
    as (group, raft), here (raft, group) as everywhere.
    """
    if key.endswith((".norm1.weight", ".norm1.bias", ".norm2.weight", ".norm2.bias")):
        return tensor.unflatten(0, (-1, _RAFT_SIZE)).T.flatten()
    if key != "stem.weight" and not key.endswith(".downsample.weight"):
        return tensor
    stage = 0 if key == "stem.weight" else int(key.split(".")[1])
    stride = 2 if stage else 4
    pixels = [(scale * stride) ** 2 for scale in _SCALES[stage]]
    dim = tensor.shape[1] // sum(pixels)
    parts = tensor.split([dim * each for each in pixels], dim=1)
    return torch.cat([part.unflatten(1, (dim, -1)) for part in parts], dim=2)


_KEYS = KeyMap(
    rename=[
        (r"^levels\.0\.fn\.0\.fc\.", "stem."),
        (r"^levels\.(\d+)\.fn\.0\.fc\.", r"stages.\1.downsample."),
        (r"^levels\.(\d+)\.fn\.(\d+)\.", lambda match: f"stages.{match[1]}.blocks.{int(match[2]) - 2}."),
        (r"\.1\.norm\.1\.", ".norm1."),
        (r"\.3\.norm\.1\.", ".norm2."),
        (r"\.5\.norm\.", ".norm3."),
        (r"\.1\.fn\.", ".vertical.mlp."),
        (r"\.3\.fn\.", ".horizontal.mlp."),
        (r"\.5\.fn\.", ".mlp."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^heads\.0\.1\.", "norm."),
        (r"^classifier\.", "head.fc."),
    ],
    transform=_laid_out,
)


def _layout(embed_dims: Sequence[int], side: int = 56, **options: Any) -> Layout:
    downsamplers = [partial(MultiScalePatches, scales=scales) for scales in _SCALES]
    grids = [-(-side >> stage) for stage in range(4)]
    layers = {
        "stem_layer": partial(MultiScalePatches, scales=_SCALES[0], images=True),
        "downsample_layer": downsamplers,
        "block_layer": RaftBlock,
        "mixer": [{"name": "raft", "grid_size": (grid, grid), "raft_size": _RAFT_SIZE} for grid in grids],
        "mlp_layer": mlp,
    }
    sizes = {"embed_dims": tuple(embed_dims), "depths": (2, 2, 6, 2), "num_heads": (1, 1, 1, 1)}
    return Layout(Hierarchical, layers | sizes | options, _KEYS, first_conv="stem")


VARIANTS = {
    "raftmlp_s": Variant(_layout(doubled(64))),
    "raftmlp_m": Variant(_layout(doubled(96))),
    "raftmlp_l": Variant(_layout((128, 192, 512, 1024))),
    "test_raftmlp": Variant(_layout(doubled(16), 24, img_size=96, depths=(1, 1, 2, 1))),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2108.04384",
    paper_name="RaftMLP: How Much Can Be Done Without Attention and with Less Spatial Locality?",
    license="apache-2.0",
)

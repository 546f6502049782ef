"""Mamba-YOLO's backbone: a pyramid of blocks that project, look around, scan in four directions and gate.

Source: Mamba-YOLO (Wang et al. 2024, arXiv 2406.05835). A detector reads the maps of the last three stages, which
`features_only=True` gives; there is no classifier unless `num_classes` asks for a fresh one. Of a whole detector's file
the neck and head are left out. The mixer is `visionmix.mixers.CrossScan`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from visionmix.backbones import Block, Hierarchical
from visionmix.layers import BatchNorm, ConvPosition, PatchMerging, Stem, StemConv
from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts.vmamba import vmamba

_EPS = 1e-3  # of every batch norm


class _Pyramid(Hierarchical):
    """`Hierarchical` whose stages, all but the first, a detector reads."""

    @staticmethod
    def feature_indices(options: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(range(1, len(options["depths"])))


def _stem(in_chans: int, embed_dim: int, patch_size: int, **dd: Any) -> Stem:
    """Return two 3x3 convolutions of stride 2 with batch norms, GELU and SiLU; the first has half of the channels."""
    if patch_size != 4 or embed_dim % 2:
        raise ValueError(f"patch_size={patch_size} and embed_dim={embed_dim} do not fit; give 4 and an even number")
    norm = partial(nn.BatchNorm2d, eps=_EPS)
    first = StemConv(embed_dim // 2, 3, 2, bias=False, norm_layer=norm, act_layer=nn.GELU)
    return Stem(in_chans, [first, first._replace(channels=embed_dim, act_layer=nn.SiLU)], **dd)


def _project(dim: int, out_dim: int, *, bias: bool = True, **dd: Any) -> nn.Sequential:
    """Return ``silu(batch_norm(W x + b))``."""
    return nn.Sequential(nn.Linear(dim, out_dim, bias=bias, **dd), BatchNorm(out_dim, _EPS, **dd), nn.SiLU())


def _merging(dim: int, out_dim: int, **dd: Any) -> PatchMerging:
    """Return ``silu(batch_norm(W x + b))`` of the patches of `PatchMerging`."""
    merging = PatchMerging(dim, out_dim, norm_layer=nn.Identity, **dd)
    merging.reduction = _project(4 * dim, out_dim, **dd)
    return merging


class _GatedMlp(nn.Module):
    """``W_2 (gelu(h + depthwise3x3(h)) * g)`` with ``h, g = W_1 x``, as a feed-forward of maps."""

    needs_map = True

    def __init__(self, dim: int, mlp_ratio: float = 4.0, **dd: Any) -> None:
        super().__init__()
        hidden = int(2 * int(dim * mlp_ratio) / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.around = ConvPosition(hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.act(h + self.around(h)) * gate)


class _Block(Block):
    """``h = project(x)``, then ``x = h + mixer(norm1(h + local(h)))``, then ``x + mlp(norm2(x))``."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, **options)
        dd = {"device": options["device"], "dtype": options["dtype"]}
        self.project = _project(dim, dim, **dd)
        linear = partial(nn.Linear, dim, dim, **dd)
        # W_2 gelu(W_1 batch_norm(depthwise3x3(h))), all with biases
        self.local = nn.Sequential(ConvPosition(dim, **dd), BatchNorm(dim, _EPS, **dd), linear(), nn.GELU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        x = self.scale1(x, self.mixer(self.norm1(x + self.local(x))))
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


class _Pooled(nn.Module):
    """``project2([y, m(y), m(m(y)), m(m(m(y)))])`` with ``y = project1(x)`` and a 5x5 maximum m: YOLO's SPPF."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.project1 = _project(dim, dim // 2, bias=False, **dd)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.project2 = _project(dim // 2 * 4, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.project1(x).permute(0, 3, 1, 2)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.project2(torch.cat(maps, dim=1).permute(0, 2, 3, 1))


_PARTS = {"conv": "0", "bn": "1.bn", "fc1": "0.conv", "norm": "1.bn", "fc2": "2", "fc3": "4"}
_KEYS = KeyMap(
    rename=[
        (r"^model\.0\.conv\.([03])\.", lambda match: f"stem.conv{int(match[1]) // 3 + 1}."),
        (r"^model\.0\.conv\.([14])\.", lambda match: f"stem.norm{int(match[1]) // 3 + 1}."),
        (r"^model\.([246])\.pw_linear\.", lambda match: f"stages.{int(match[1]) // 2}.downsample.reduction."),
        (r"^model\.8\.cv(\d)\.(\w+)\.", lambda match: f"stages.3.norm.project{match[1]}.{_PARTS[match[2]]}."),
        (r"^model\.([1357])\.(?=[a-z])", r"model.\1.0."),  # one block stands alone, several in a list
        (r"^model\.([1357])\.", lambda match: f"stages.{int(match[1]) // 2}.blocks."),
        (r"\.(reduction|proj_conv)\.1\.", r".\1.1.bn."),
        (r"\.proj_conv\.", ".project."),
        (r"\.norm(2?)\.norm\.", r".norm\1."),
        (r"\.lsblock\.(\w+)\.", lambda match: f".local.{_PARTS[match[1]]}."),
        (r"\.mlp\.dwconv\.", ".mlp.around.conv."),
    ],
    drop={r"^model\.(9|\d\d)\.": "the detector's neck and head"},
    lacks={r"^head\.": "a detector has no classifier"},
)


def _layout(dims: Sequence[int], depths: Sequence[int], **options: Any) -> Layout:
    layers = {
        "stem_layer": _stem,
        "downsample_layer": _merging,
        "block_layer": _Block,
        "mlp_layer": _GatedMlp,
        "norm_layer": partial(LayerNorm, eps=1e-6),
        "stage_norm_layer": [*[None] * (len(dims) - 1), _Pooled],
        "final_norm_layer": None,
        "num_classes": 0,
    }
    mixer = {"name": "cross_scan", "expand": 2.0, "d_state": 16, "gate": True, "conv_bias": True, "act_layer": nn.GELU}
    host = vmamba(dims[0], depths, mixer, **layers | options)
    return Layout(_Pyramid, host.options | {"embed_dims": tuple(dims)}, _KEYS + host.keys)


VARIANTS = {
    "mamba_yolo_t_backbone": Variant(_layout((32, 64, 128, 256), (1, 1, 3, 1))),
    "mamba_yolo_b_backbone": Variant(_layout((64, 128, 256, 512), (1, 1, 3, 1))),
    "mamba_yolo_l_backbone": Variant(_layout((96, 192, 384, 576), (2, 2, 6, 2))),  # at most 768 channels, times 0.75
    "test_mamba_yolo": Variant(_layout((16, 32, 64, 128), (1, 1, 2, 1), img_size=96, num_classes=1000)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2406.05835",
    paper_name="Mamba YOLO: A Simple Baseline for Object Detection with State Space Model",
    license="agpl-3.0",
)

"""LocalMamba: scans by rows, columns and small windows, in four directions that a search chose for each block.

Source: LocalMamba (Huang et al. 2024, arXiv 2403.09338). `local_vim_*` has the layout of Vim, `local_vmamba_*` that of
VMamba's first version. The mixers are `visionmix.mixers.MultiMamba` and `visionmix.mixers.LocalScan`.

The published code brings scans by columns back to the map by an inverse that is right for square maps alone, on which
the weights were trained. Here it is right for all; ``published_inverse=True`` computes what the published code does.

GMACs here include scans, at nine for each state and cell: 0.87 of the tiny LocalVim's 2.13. The linear layers and
convolutions of the published code count to 1.26 there, so its 1.5 counts less for a scan.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.fx
from torch import Tensor

from visionmix.backbones import Block, Hierarchical, Plain
from visionmix.layers import at_least_float32, patch_stem, resample_map
from visionmix.layers.rotary import turned
from visionmix.models import KeyMap, Layout, Variant, Weights, register_family
from visionmix.models.hosts.vim import vim
from visionmix.models.hosts.vmamba import vmamba

_ORDERS = {"h": "raster", "v": "column", "w2": "window_2", "w7": "window_7"}
# As the published code names directions, "-" for its "_flip"; commas part the blocks.
_VIM_TINY = """
    h v- w7 w7-, h- w2- w7 w7-, h h- v w7, h h- v v-, h h- v v-, h h- v v-, h- v v- w7, h- v v- w2-, h h- v v-, h h- v
    v-, h v v- w2, h v v- w2-, h h- v- w7, h- v v- w2, h h- v v-, h v w2 w2-, v v- w2 w7, h h- v w2, h h- w2- w7, v v-
    w2 w2-"""
# The published code defines local_vim_small twice, first with the directions above. This is its latter definition.
_VIM_SMALL = ", ".join(["h h- w2 w2-"] * 20)
_VMAMBA_TINY = """
    h h- w7 w7-, h- v- w2 w2-, h- v- w2- w7, h- v v- w2, h h- v- w2-, h- v- w2 w2-, h w2- w7 w7-, h h- v v-, h v- w7
    w7-, h- v w2 w7-, v v- w2 w7-, h h- v- w2-, v- w2- w7 w7-, h- v- w2- w7-, h- v w7 w7-"""
_VMAMBA_SMALL = """
    h v v- w7-, h h- v w7, h- v v- w7, h- v w2- w7, h- v w2- w7, h- v- w2 w7-, h- v v- w7, h v v- w7, h v v- w7, h v
    v- w7-, h h- v v-, h v v- w2, v v- w2- w7, h h- v w2, h- v v- w7-, h h- v v-, h v v- w7-, h v v- w7-, h h- v- w7,
    h- v- w2- w7, h- v v- w7-, v v- w7 w7-, h v v- w7-, h- v v- w2, h v v- w2-, h h- v w7, h h- w7 w7-, h v- w2 w2-, h
    v- w2 w7, h v v- w7-, h- v w2- w7, h- v- w7 w7-, h v w7 w7-"""


class _Published:
    """A skeleton with the option `published_inverse` of its mixers."""

    def __init__(self, *arguments: Any, mixer: Any, published_inverse: bool = False, **options: Any) -> None:
        super().__init__(*arguments, mixer=_with_inverse(mixer) if published_inverse else mixer, **options)


class LocalVim(_Published, Plain):
    """`visionmix.backbones.Plain` with the option `published_inverse` of `visionmix.mixers.MultiMamba`."""


class LocalVMamba(_Published, Hierarchical):
    """`visionmix.backbones.Hierarchical` with the option `published_inverse` of `visionmix.mixers.LocalScan`."""


def _with_inverse(mixer: Any) -> Any:
    if isinstance(mixer, Mapping) and "name" in mixer:
        return {**mixer, "published_inverse": True}
    if isinstance(mixer, Mapping):
        return {key: _with_inverse(value) for key, value in mixer.items()}
    return {"name": mixer, "published_inverse": True} if isinstance(mixer, str) else [_with_inverse(m) for m in mixer]


@torch.fx.wrap
def _turn(x: Tensor) -> Tensor:
    """Return the map x (batch, height, width, dim), pairs of channels turned by row and column.

    The pairs of the first half of the channels turn by the row, the others by the column, pair i by ``10000^(-4i/dim)``
    radians a row or column of a map with 14 of each. For other maps the cosines and sines are resampled, as the
    published code does it, although they are then no longer those of any angle.
    """
    wide = at_least_float32(x)
    frequencies = 1.0 / (10000 ** (torch.arange(0, x.shape[3], 4, dtype=torch.float32, device=x.device) / x.shape[3]))
    angles = torch.arange(14, device=x.device).unsqueeze(1) * frequencies
    cosine = _spread(angles.cos().to(wide.dtype), x.shape[1], x.shape[2])
    sine = _spread(angles.sin().to(wide.dtype), x.shape[1], x.shape[2])
    return turned(wide, cosine, sine).to(x.dtype)


def _spread(table: Tensor, height: int, width: int) -> Tensor:
    """Return (1, height, width, 2 * features) of a table (14, features): that of each cell's row, of its column."""
    rows = resample_map(table.unsqueeze(1).unsqueeze(0), height, 1).expand(1, height, width, table.shape[1])
    columns = resample_map(table.unsqueeze(0).unsqueeze(0), 1, width).expand(1, height, width, table.shape[1])
    return torch.cat([rows, columns], dim=3)


class _TurnedBlock(Block):
    """`Block` of the whole stream turned by rotary position encodings, the residual too."""

    has_mlp: Final[bool]  # repeated: TorchScript knows only the constants of the class itself

    def forward(self, x: Tensor) -> Tensor:
        x = _turn(x)
        x = self.scale1(x, self.mixer(self.norm1(x)))
        return self.scale2(x, self.mlp(self.norm2(x))) if self.has_mlp else x


_GATE = [(r"\.attn\.global_reduce\.", ".attn.fc1."), (r"\.attn\.channel_select\.", ".attn.fc2.")]
_PLAIN_KEYS = KeyMap(
    rename=[
        *_GATE,
        (r"\.mixer\.attn\.", ".mixer.channel_gate."),
        (r"\.mixer\.(A_log|D)_(\d)$", r".mixer.scans.\2.\1"),
        (r"\.mixer\.conv1d_(\d)\.", r".mixer.scans.\1.conv."),
        (r"\.mixer\.x_proj_(\d)\.", r".mixer.scans.\1.x_proj."),
        (r"\.mixer\.dt_proj_(\d)\.", r".mixer.scans.\1.delta_"),
    ],
    drop={r"^rope\.freqs_(cos|sin)$": "the rotary encodings' tables, which the model computes"},
)
_STAGE_KEYS = KeyMap(rename=[*_GATE, (r"\.mixer\.multi_scan\.attn\.", ".mixer.channel_gate.")])


def _mixers(name: str, directions: str) -> list[dict[str, Any]]:
    """Return a mixer for every block of `directions`."""

    def order(direction: str) -> str:
        return _ORDERS[direction.rstrip("-")] + ("_reversed" if direction.endswith("-") else "")

    blocks = directions.replace("\n", " ").split(",")
    return [{"name": name, "directions": [order(each) for each in block.split()]} for block in blocks]


def _plain(dim: int, directions: str, class_token: bool = False, **options: Any) -> Layout:
    mixers = _mixers("multi_mamba", directions)
    turning = {} if class_token else {"prefix_tokens": None, "global_pool": "avg", "block_layer": _TurnedBlock}
    stem = partial(patch_stem, norm_layer=None, whole=True)
    host = vim(dim, len(mixers), mixers, stem_layer=stem, **turning, **options)
    return Layout(LocalVim, host.options, host.keys + _PLAIN_KEYS)


def _stages(dim: int, depths: Sequence[int], directions: str, **options: Any) -> Layout:
    mixers = iter(_mixers("local_scan", directions))
    stages = [[next(mixers) for _ in range(depth)] for depth in depths]
    host = vmamba(dim, depths, stages, patch_merging=True, mlp_layer=None, **options)
    return Layout(LocalVMamba, host.options, host.keys + _STAGE_KEYS)


_release = partial("https://github.com/hunto/LocalMamba/releases/{}".format)


def _in1k(file: str, top1: float) -> dict[str, Weights]:
    return {"in1k": Weights(_release(f"download/v1.0.0/{file}.ckpt"), top1=top1)}


# The README links the small LocalVMamba's file as the small LocalVim's too; the release should have its own.
_VIM_SMALL_IN1K = {"in1k": Weights(page=_release("tag/v1.0.0"), top1=81.1)}
_SMALL = (2, 2, 27, 2)

VARIANTS = {
    "local_vim_tiny": Variant(_plain(192, _VIM_TINY), _in1k("local_vim_tiny", 76.2), 8, 1.5),
    "local_vim_tiny_middle_cls_token": Variant(
        _plain(192, _VIM_TINY, class_token=True), _in1k("local_vim_tiny_middle_cls_token", 77.8), 8, 1.5
    ),
    "local_vim_small": Variant(_plain(384, _VIM_SMALL), _VIM_SMALL_IN1K, 28, 4.8),
    "local_vmamba_tiny": Variant(_stages(96, (2, 2, 9, 2), _VMAMBA_TINY), {}, 26, 5.7),
    "local_vmamba_small": Variant(_stages(96, _SMALL, _VMAMBA_SMALL), _in1k("local_vssm_small", 83.7), 50, 11.4),
    "test_local_vim": Variant(_plain(32, "h v- w2, v w2-, h-", img_size=96)),
    "test_local_vim_middle_cls_token": Variant(_plain(32, "h- v, w2 w2-, v-", class_token=True, img_size=96)),
    "test_local_vmamba": Variant(_stages(16, (1, 1, 1, 1), "h h-, v w2, v- w7-, w2- w7", img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2403.09338",
    paper_name="LocalMamba: Visual State Space Model with Windowed Selective Scan",
    license="apache-2.0",
)

"""Agent attention in DeiT, PVT, Swin and CSWin.

Source: Agent Attention (Han et al. 2023, arXiv 2312.08874). The models differ from their hosts by a table only; the
mixer is `visionmix.mixers.AgentAttention`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionmix.backbones import Hierarchical, Plain
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.hosts import cswin, deit, pvt, swin
from visionmix.models.weights import KeyMap, split_class_position

_NONE = Published()


def _agent(stage: int) -> dict[str, Any]:
    return {"name": "agent", "num_agents": (9, 16, 49, 49)[stage]}


def _window_size(side: int) -> int:
    return max(7, side // 8)


def _variant(
    skeleton: type[nn.Module], host: dict[str, Any], file: str = "", published: Published = _NONE, **options: Any
) -> Variant:
    weights = {"url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"} if file else {}
    return Variant(skeleton, host | options, weights, published)


def _deit(dim: int, heads: int, agents: int, blocks: int = 12, depth: int = 12) -> dict[str, Any]:
    agent = {"name": "agent", "num_agents": agents, "class_bias": True}
    return deit.deit(dim, heads, [agent] * blocks + ["softmax"] * (depth - blocks))


def _pvt(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> dict[str, Any]:
    return pvt.pvt(dims, depths, [_agent(stage) for stage in range(4)])


def _swin(dim: int, depths: Sequence[int], heads: int, layout: str) -> dict[str, Any]:
    return swin.swin(dim, depths, heads, layout, _agent, _window_size)


def _cswin(dim: int, depths: Sequence[int], heads: int) -> dict[str, Any]:
    return cswin.cswin(dim, depths, heads, "AABB", _agent)


VARIANTS = {
    "agent_deit_tiny": _variant(Plain, _deit(192, 3, 49), "57e0904221824ee7b7af", Published(6.0, 1.2, 74.9)),
    "agent_deit_small": _variant(Plain, _deit(384, 6, 49), "fdd43304372541db8ea7", Published(22.7, 4.4, 80.5)),
    "agent_deit_base": _variant(Plain, _deit(768, 12, 81, 4), "5115f15fdd7e4ab58fbc", Published(87.2, 17.6, 82.0)),
    "agent_pvt_tiny": _variant(Hierarchical, _pvt((2, 2, 2, 2)), "13fdf0e0a7c5498c934f", Published(11.6, 2.0, 78.4)),
    "agent_pvt_small": _variant(Hierarchical, _pvt((3, 4, 6, 3)), "36b8be9a8863456685a3", Published(20.6, 4.0, 82.2)),
    "agent_pvt_medium": _variant(Hierarchical, _pvt((3, 4, 18, 3)), "4d00ecacf18b45f9b88c", Published(35.9, 7.0, 83.4)),
    "agent_pvt_large": _variant(Hierarchical, _pvt((3, 8, 27, 3)), "040cfe0cfbbe4762ad09", Published(48.7, 10.4, 83.7)),
    "agent_swin_tiny": _variant(
        Hierarchical, _swin(96, (2, 2, 6, 2), 3, "AAAB"), "a2ddc1190c224f768a41", Published(29, 4.5, 82.6)
    ),
    "agent_swin_small": _variant(
        Hierarchical, _swin(96, (2, 2, 18, 2), 3, "AABB"), "f607172c9fea4d6e99bb", Published(50, 8.7, 83.7)
    ),
    "agent_swin_base": _variant(
        Hierarchical, _swin(128, (2, 2, 18, 2), 4, "AAMB2"), "4fcd2d0114bb490483c3", Published(88, 15.4, 84.0)
    ),
    "agent_cswin_tiny": _variant(
        Hierarchical, _cswin(64, (2, 4, 18, 1), 2), "8c562a74441e46d5902b", Published(21, 4.3, 83.1)
    ),
    "agent_cswin_small": _variant(
        Hierarchical, _cswin(64, (3, 6, 29, 2), 2), "30eb8af675bc4b7a8747", Published(33, 6.8, 83.9)
    ),
    "agent_cswin_base": _variant(
        Hierarchical, _cswin(96, (3, 6, 29, 2), 4), "c8035b0839b2410c8c9f", Published(73, 14.9, 84.7)
    ),
    "test_agent_deit_tiny": _variant(Plain, _deit(32, 2, 9, blocks=2, depth=3), img_size=96),
    "test_agent_pvt": _variant(Hierarchical, _pvt((1, 1, 2, 1), (8, 16, 40, 64)), img_size=96),
    "test_agent_swin": _variant(Hierarchical, _swin(16, (3, 1, 1, 1), 1, "MAAB1"), img_size=96),
    "test_agent_cswin": _variant(Hierarchical, _cswin(16, (1, 1, 2, 1), 2), img_size=96),
}

_BIAS_NAMES = [
    (rf"\.mixer\.{old}_bias$", f".mixer.{new}")
    for old, new in (
        ("an", "key_table"),
        ("ah", "key_rows"),
        ("aw", "key_columns"),
        ("ac", "key_class"),
        ("na", "query_table"),
        ("ha", "query_rows"),
        ("wa", "query_columns"),
        ("ca", "query_class"),
    )
]


def key_map(model: nn.Module) -> KeyMap:
    """Return the map from the published files' keys to those of `model`."""
    hosts = [*deit.NAMES, *pvt.NAMES, *swin.NAMES, *cswin.NAMES]
    names = [*hosts, (r"\.mixer\.dwc\.", ".mixer.conv."), *_BIAS_NAMES]
    return KeyMap(rename=names, drop=swin.DROP, join=pvt.JOIN, transform=_transform)


def _transform(key: str, tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the biases of rows, columns and class token as (heads, agents, cells), the positions split."""
    _, _, leaf = key.rpartition(".mixer.")
    if leaf in ("key_rows", "key_columns", "key_class"):  # (1, heads, agents, ...)
        return tensor.flatten(3).squeeze(0)
    if leaf in ("query_rows", "query_columns", "query_class"):  # (1, heads, ..., agents)
        return tensor.flatten(2, -2).squeeze(0).transpose(1, 2)
    return split_class_position(key, tensor)


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2312.08874", license="unknown")

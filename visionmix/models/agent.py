"""Agent attention in DeiT and Swin.

Source: Agent Attention (Han et al. 2023, arXiv 2312.08874). The models differ from their hosts by a table only; the
mixer is `visionmix.mixers.AgentAttention`.
"""

from typing import Any

from torch import Tensor, nn

from visionmix.backbones import Hierarchical, Plain
from visionmix.models.family import Published, Variant, register_family
from visionmix.models.hosts import deit, swin
from visionmix.models.weights import KeyMap, split_class_position

_NONE = Published()
_STAGE_AGENTS = (9, 16, 49, 49)


def _agent(stage: int) -> dict[str, Any]:
    return {"name": "agent", "num_agents": _STAGE_AGENTS[stage]}


def _window_size(side: int) -> int:
    return max(7, side // 8)


def _weights(file: str) -> dict[str, str]:
    return {"url": f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"} if file else {}


def _deit(
    dim: int, heads: int, agents: int, file: str = "", published: Published = _NONE, blocks: int = 12, **options: Any
) -> Variant:
    agent = {"name": "agent", "num_agents": agents, "class_bias": True}
    mixers = [agent] * blocks + ["softmax"] * (options.pop("depth", 12) - blocks)
    return Variant(Plain, deit.deit(dim, heads, mixers) | options, _weights(file), published)


def _swin(
    dim: int, depth: int, heads: int, layout: str, file: str = "", published: Published = _NONE, **options: Any
) -> Variant:
    depths = options.pop("depths", (2, 2, depth, 2))
    host = swin.swin(dim, depths, heads, layout, _agent, _window_size)
    return Variant(Hierarchical, host | options, _weights(file), published)


VARIANTS = {
    "agent_deit_tiny": _deit(192, 3, 49, "57e0904221824ee7b7af", Published(6.0, 1.2, 74.9)),
    "agent_deit_small": _deit(384, 6, 49, "fdd43304372541db8ea7", Published(22.7, 4.4, 80.5)),
    "agent_deit_base": _deit(768, 12, 81, "5115f15fdd7e4ab58fbc", Published(87.2, 17.6, 82.0), blocks=4),
    "agent_swin_tiny": _swin(96, 6, 3, "AAAB", "a2ddc1190c224f768a41", Published(29, 4.5, 82.6)),
    "agent_swin_small": _swin(96, 18, 3, "AABB", "f607172c9fea4d6e99bb", Published(50, 8.7, 83.7)),
    "agent_swin_base": _swin(128, 18, 4, "AAMB2", "4fcd2d0114bb490483c3", Published(88, 15.4, 84.0)),
    "test_agent_deit": _deit(32, 2, 9, img_size=96, blocks=2, depth=3),
    "test_agent_swin": _swin(16, 1, 1, "MAAB1", img_size=96, depths=(3, 1, 1, 1)),
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
    names = [*swin.NAMES, *deit.NAMES, (r"\.mixer\.dwc\.", ".mixer.conv."), *_BIAS_NAMES]
    return KeyMap(rename=names, drop=swin.DROP, transform=_transform)


def _transform(key: str, tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """Return the biases of rows, columns and class token as (heads, agents, cells), the positions split."""
    _, _, leaf = key.rpartition(".mixer.")
    if leaf in ("key_rows", "key_columns", "key_class"):  # (1, heads, agents, ...)
        return tensor.flatten(3).squeeze(0)
    if leaf in ("query_rows", "query_columns", "query_class"):  # (1, heads, ..., agents)
        return tensor.flatten(2, -2).squeeze(0).transpose(1, 2)
    return split_class_position(key, tensor)


register_family(__name__, VARIANTS, key_map=key_map, paper="arXiv 2312.08874", license="unknown")

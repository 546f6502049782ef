"""Agent: agent attention in DeiT, PVT, Swin and CSWin.

Source: Agent Attention (Han et al. 2023, arXiv 2312.08874). The models differ from their hosts by a table only; the
mixer is `visionmix.mixers.AgentAttention`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visionmix.models import KeyMap, Layout, Variant, register_family
from visionmix.models.hosts import cswin, deit, leaplab_in1k, pvt, swin


def _transform(key: str, tensor: Tensor) -> Tensor:
    """Return the biases of rows, columns and class token as (heads, agents, cells)."""
    _, _, leaf = key.rpartition(".mixer.")
    if leaf in ("key_rows", "key_columns", "key_class"):  # (1, heads, agents, ...)
        return tensor.flatten(3).squeeze(0)
    if leaf in ("query_rows", "query_columns", "query_class"):  # (1, heads, ..., agents)
        return tensor.flatten(2, -2).squeeze(0).transpose(1, 2)
    return tensor


_BIASES = {
    "an": "key_table",
    "ah": "key_rows",
    "aw": "key_columns",
    "ac": "key_class",
    "na": "query_table",
    "ha": "query_rows",
    "wa": "query_columns",
    "ca": "query_class",
}
_KEYS = KeyMap(
    rename=[
        (r"\.mixer\.dwc\.", ".mixer.conv."),
        *((rf"\.mixer\.{old}_bias$", f".mixer.{new}") for old, new in _BIASES.items()),
    ],
    transform=_transform,
)


def _agent(stage: int) -> dict[str, Any]:
    return {"name": "agent", "num_agents": (9, 16, 49, 49)[stage]}


def _deit(dim: int, heads: int, agents: int, blocks: int = 12, depth: int = 12) -> Layout:
    agent = {"name": "agent", "num_agents": agents, "class_bias": True}
    return deit.deit(dim, heads, [agent] * blocks + ["softmax"] * (depth - blocks)).with_keys(_KEYS)


def _pvt(depths: Sequence[int], dims: Sequence[int] = (64, 128, 320, 512)) -> Layout:
    return pvt.pvt(dims, depths, [_agent(stage) for stage in range(4)]).with_keys(_KEYS)


def _swin(dim: int, depths: Sequence[int], heads: int, letters: str) -> Layout:
    return swin.swin(dim, depths, heads, letters, _agent, swin.seven_or_eighth).with_keys(_KEYS)


def _cswin(dim: int, depths: Sequence[int], heads: int) -> Layout:
    return cswin.cswin(dim, depths, heads, "AABB", _agent).with_keys(_KEYS)


VARIANTS = {
    "agent_deit_tiny": Variant(_deit(192, 3, 49), leaplab_in1k("57e0904221824ee7b7af", 74.9), 6.0, 1.2),
    "agent_deit_small": Variant(
        _deit(384, 6, 49),
        leaplab_in1k("fdd43304372541db8ea7", 80.5)
        | leaplab_in1k("a228f86241c445f1969b", 83.1, input_size=448, crop_pct=0.875, gmacs=17.7),
        22.7,
        4.4,
    ),
    "agent_deit_base": Variant(_deit(768, 12, 81, 4), leaplab_in1k("5115f15fdd7e4ab58fbc", 82.0), 87.2, 17.6),
    "agent_pvt_tiny": Variant(_pvt((2, 2, 2, 2)), leaplab_in1k("13fdf0e0a7c5498c934f", 78.4), 11.6, 2.0),
    "agent_pvt_small": Variant(_pvt((3, 4, 6, 3)), leaplab_in1k("36b8be9a8863456685a3", 82.2), 20.6, 4.0),
    "agent_pvt_medium": Variant(
        _pvt((3, 4, 18, 3)),
        leaplab_in1k("4d00ecacf18b45f9b88c", 83.4)
        | leaplab_in1k("654df734121643b19c52", 83.8, input_size=256, crop_pct=0.875, gmacs=9.2),
        35.9,
        7.0,
    ),
    "agent_pvt_large": Variant(_pvt((3, 8, 27, 3)), leaplab_in1k("040cfe0cfbbe4762ad09", 83.7), 48.7, 10.4),
    "agent_swin_tiny": Variant(_swin(96, (2, 2, 6, 2), 3, "AAAB"), leaplab_in1k("a2ddc1190c224f768a41", 82.6), 29, 4.5),
    "agent_swin_small": Variant(
        _swin(96, (2, 2, 18, 2), 3, "AABB"),
        leaplab_in1k("f607172c9fea4d6e99bb", 83.7)
        | leaplab_in1k("09760394e93b4046a25e", 84.1, input_size=288, gmacs=14.6),
        50,
        8.7,
    ),
    "agent_swin_base": Variant(
        _swin(128, (2, 2, 18, 2), 4, "AAMB2"),
        leaplab_in1k("4fcd2d0114bb490483c3", 84.0)
        | leaplab_in1k("bb84ee9058954706a557", 84.9, input_size=384, gmacs=46.3),
        88,
        15.4,
    ),
    "agent_cswin_tiny": Variant(_cswin(64, (2, 4, 18, 1), 2), leaplab_in1k("8c562a74441e46d5902b", 83.1), 21, 4.3),
    "agent_cswin_small": Variant(_cswin(64, (3, 6, 29, 2), 2), leaplab_in1k("30eb8af675bc4b7a8747", 83.9), 33, 6.8),
    "agent_cswin_base": Variant(
        _cswin(96, (3, 6, 29, 2), 4),
        leaplab_in1k("c8035b0839b2410c8c9f", 84.7)
        | leaplab_in1k("1239be0df44b47719432", 85.8, input_size=384, crop_pct=0.875, gmacs=46.3),
        73,
        14.9,
    ),
    "test_agent_deit_tiny": Variant(_deit(32, 2, 9, blocks=2, depth=3).with_options(img_size=96)),
    "test_agent_pvt": Variant(_pvt((1, 1, 2, 1), (8, 16, 40, 64)).with_options(img_size=96)),
    "test_agent_swin": Variant(_swin(16, (3, 1, 1, 1), 1, "MAAB1").with_options(img_size=96)),
    "test_agent_cswin": Variant(_cswin(16, (1, 1, 2, 1), 2).with_options(img_size=96)),
}

register_family(
    __name__,
    VARIANTS,
    paper="arXiv 2312.08874",
    paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
)

"""Hosts: published layouts that several families share and fill with token mixers of their own.

A host is a function from sizes and mixers to a `visionmix.models.Layout`: the options of a skeleton, and how the keys
of that layout's published files become the skeleton's. A family adds its mixers, and the names of their tensors by
`Layout.with_keys`.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from visionmix.backbones.contract import MixerSpec
from visionmix.models.layout import Layout

HEAD = (r"^head\.(weight|bias)$", r"head.fc.\1")
"""Rename of the classifier, which most published code calls head."""


def doubled(first: int, stages: int = 4) -> tuple[int, ...]:
    """Return `first` for the first of `stages`, twice as much for every later one."""
    return tuple(first << stage for stage in range(stages))


def mixers_by_letter(
    layout: str,
    depths: Sequence[int],
    linear: Callable[[int], MixerSpec],
    softmax: Callable[[int], Sequence[MixerSpec]],
) -> list[MixerSpec | list[MixerSpec]]:
    """Return the mixers of every stage, of a layout as the published configurations spell it.

    Stages of one kind are built with any depth.

    Args:
        layout: A letter per stage: "B" or "S" for softmax attention, "M" for linear attention in the stage's first
            blocks and softmax in the others, any other for linear attention. After the stages' letters comes the number
            of blocks that "M" stands for: ``"AAMB2"``.
        depths: Blocks of each stage.
        linear: Makes the family's own mixer from the stage's number, which counts from 0.
        softmax: Makes softmax attention from the stage's number: the mixers that its blocks take in turn, counted from
            the stage's first block even if it has linear attention.
    """
    letters, first = layout[: len(depths)], layout[len(depths) :]

    def mixers(stage: int, letter: str, depth: int) -> MixerSpec | list[MixerSpec]:
        if letter not in "BSM":
            return linear(stage)
        cycle = list(softmax(stage))
        if letter != "M":
            return {"cycle": cycle}
        return [linear(stage) if block < int(first) else cycle[block % len(cycle)] for block in range(depth)]

    return [mixers(stage, *each) for stage, each in enumerate(zip(letters, depths, strict=True))]


def with_norm(layout: Layout, norm_layer: Callable[..., nn.Module]) -> Layout:
    """Return the `layout` of a hierarchical host with `norm_layer` for every norm, those of stem and downsamplers too.

    Norms inside mixers are the mixers' own.
    """
    places = {key: partial(layout.options[key], norm_layer=norm_layer) for key in ("stem_layer", "downsample_layer")}
    return layout.with_options(norm_layer=norm_layer, **places)

"""Hosts: published layouts that several families share and fill with token mixers of their own.

A host is a function from sizes and mixers to a `visionmix.models.Layout`: the options of a skeleton, and how the keys
of that layout's published files become the skeleton's. A family adds its mixers, and the names of their tensors by
`Layout.with_keys`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from visionmix.backbones import Stage
from visionmix.backbones.contract import MixerSpec
from visionmix.layers.truncated import DrawnConvolutions
from visionmix.models.layout import Layout
from visionmix.models.weights import Weights

HEAD = (r"^head\.(weight|bias)$", r"head.fc.\1")
"""Rename of the classifier, which most published code calls head."""


def doubled(first: int, stages: int = 4) -> tuple[int, ...]:
    """Return `first` for the first of `stages`, twice as much for every later one."""
    return tuple(first << stage for stage in range(stages))


def leaplab_in1k(file: str, top1: float, crop_mode: str = "squash", **facts: Any) -> dict[str, Weights]:
    """Return the weights for ImageNet-1k that LeapLab keeps in its university's cloud, by tag.

    Args:
        file: The file's number in the cloud.
        top1: Published accuracy in percent.
        crop_mode: How test images are resized, as `Weights` has it: data/build.py of Agent, FLatten and InLine makes
            them square, before it cuts out the centre unless TEST.CROP is off.
        **facts: Other facts of `Weights`; an `input_size` becomes part of the tag.
    """
    tag = f"in1k_{facts['input_size']}" if "input_size" in facts else "in1k"
    address = f"https://cloud.tsinghua.edu.cn/f/{file}/?dl=1"
    return {tag: Weights(address, top1=top1, crop_mode=crop_mode, **facts)}


class DrawnStage(DrawnConvolutions, Stage):
    """`Stage` whose convolutions begin as its linear layers do, in ConvNeXt's way."""


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

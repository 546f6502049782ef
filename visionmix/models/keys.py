"""From the keys of a published file to those of a model."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_Replacement = str | Callable[[re.Match], str]
_Transform = Callable[[str, Tensor], Tensor | Mapping[str, Tensor]]


@dataclass(frozen=True)
class Join:
    """Several tensors of a file that are one tensor in the model.

    Every key in which the dotted name `parts[0]` stands has siblings with the other `parts` in its place; together they
    become the tensor whose key has `whole` there.

    Example:
        ``Join(("q", "kv"), "qkv")`` makes ``mixer.qkv.weight`` of ``mixer.q.weight`` and ``mixer.kv.weight``, and
        ``Join(("A_log_0", "A_log_1"), "A_log", torch.stack)`` makes ``scan.A_log`` of two tensors.

    Attributes:
        parts: Names of the file's tensors or modules, in order.
        whole: Name of the model's one.
        by: Joins the tensors of `parts`; by default one after another along the first axis.
    """

    parts: Sequence[str]
    whole: str
    by: Callable[[Sequence[Tensor]], Tensor] = torch.cat

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        """Replace the parts in `tensors` by the joined tensors; parts whose siblings are missing stay."""
        first = re.compile(rf"(?<![^.]){re.escape(self.parts[0])}(?![^.])")
        for key in [key for key in tensors if first.search(key)]:
            keys = [first.sub(part, key, count=1) for part in self.parts]
            if all(each in tensors for each in keys):
                tensors[first.sub(self.whole, key, count=1)] = self.by([tensors.pop(each) for each in keys])


@dataclass(frozen=True)
class KeyMap:
    """How the keys and tensors of a published file become the model's.

    Every key of the file is renamed (or kept) to a key of the model, or dropped by a rule that says why; every tensor
    of the model comes from the file, or is missing there by a rule that says why. ``first + second`` is `first`, then
    `second`.

    Attributes:
        rename: (pattern, replacement) pairs for `re.sub`, applied in turn to every key.
        drop: Reason by pattern; a key of the file that a pattern matches is left out.
        lacks: Reason by pattern; a key of the model that a pattern matches keeps its fresh value where the file has
            none.
        tied: Reason by pattern; several keys of the file may become a key of the model that a pattern matches, if their
            tensors are equal.
        transform: Makes the tensor to load, or several by key, from a renamed key and its tensor.
        join: Tensors of the file that are one tensor in the model; they are joined last. Any function serves that
            changes a dict of all tensors.
        reshape: Whether tensors take the model's shape where only the grouping of the axes differs: a linear layer
            saved as a 1x1 convolution, or directions stacked along the channels.
    """

    rename: Sequence[tuple[str, _Replacement]] = ()
    drop: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    transform: _Transform | None = None
    join: Sequence[Callable[[dict[str, Tensor]], None]] = ()
    reshape: bool = False

    def __add__(self, other: "KeyMap") -> "KeyMap":
        return KeyMap(
            rename=[*self.rename, *other.rename],
            drop={**self.drop, **other.drop},
            lacks={**self.lacks, **other.lacks},
            tied={**self.tied, **other.tied},
            transform=_one_after_another(self.transform, other.transform),
            join=[*self.join, *other.join],
            reshape=self.reshape or other.reshape,
        )

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors`, as a file has them, under the model's names.

        Raises:
            ValueError: two keys of the file become the same, and are not tied or differ.
        """
        mapped: dict[str, Tensor] = {}
        for source, tensor in tensors.items():
            if matches(self.drop, source):
                continue
            key = source
            for pattern, replacement in self.rename:
                key = re.sub(pattern, replacement, key)
            made = self.transform(key, tensor) if self.transform else tensor
            for each, value in _by_key(key, made):
                if each in mapped and not (matches(self.tied, each) and torch.equal(mapped[each], value)):
                    raise ValueError(
                        f"two keys of the file become {each!r}, one of them {source!r}; the file is another model's"
                    )
                mapped[each] = value
        for join in self.join:
            join(mapped)
        return mapped


def matches(patterns: Iterable[str], key: str) -> bool:
    """Return whether one of `patterns` matches somewhere in `key`."""
    return any(re.search(pattern, key) for pattern in patterns)


def _by_key(key: str, made: Tensor | Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    return made.items() if isinstance(made, Mapping) else ((key, made),)


def _one_after_another(first: _Transform | None, second: _Transform | None) -> _Transform | None:
    if first is None or second is None:
        return first or second

    def transform(key: str, tensor: Tensor) -> dict[str, Tensor]:
        between = _by_key(key, first(key, tensor))
        return {name: value for each, part in between for name, value in _by_key(each, second(each, part))}

    return transform


def shifted(template: str, by: int) -> Callable[[re.Match], str]:
    """Return a replacement that puts the first group of a match, a number, plus `by` into `template`.

    Example:
        ``(r"^layers\\.(\\d+)\\.downsample\\.", shifted("stages.{}.downsample.", 1))``: published code of the Swin kind
        ends a stage with its downsampler; here the next stage begins with it.
    """
    return lambda match: template.format(int(match[1]) + by)


NEXT_STAGE = (r"^(?:layers|levels)\.(\d+)\.downsample\.", shifted("stages.{}.downsample.", 1))
"""Rename of downsamplers: most published code ends a stage with its downsampler; here the next stage begins with it."""


def regrouped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `tensor` in `shape` where only the grouping of its axes differs, and unchanged otherwise.

    Neighbouring axes may be joined, one axis split, axes of length 1 added or dropped.
    """
    ends, own_ends = ({math.prod(each[: axis + 1]) for axis in range(len(each))} for each in (tensor.shape, shape))
    same = tensor.numel() == math.prod(shape) and (ends <= own_ends or own_ends <= ends)
    return tensor.reshape(tuple(shape)) if same else tensor


def split_class_position(key: str, tensor: Tensor, place: str = "first") -> Tensor | dict[str, Tensor]:
    """Return the cells' and the class token's positions that a file has in one, (1, 1 + cells, channels), by key.

    A transform for `KeyMap`; tensors of other keys than the skeleton's ``pos_embed.weight`` stay as they are.
    """
    if key != "pos_embed.weight" or tensor.ndim != 3:
        return tensor
    at = (tensor.shape[1] - 1) // 2 if place == "middle" else 0
    cells = torch.cat([tensor[:, :at], tensor[:, at + 1 :]], dim=1)
    return {key: cells, "class_token.pos_embed": tensor[:, at : at + 1]}

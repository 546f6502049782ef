"""The model contract of timm, once, for every skeleton."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.fx
from timm.layers import trunc_normal_
from timm.models import checkpoint
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from visionmix.backbones.intermediates import check_output_format, chosen_units, laid_out
from visionmix.layers.head import TokenHead
from visionmix.private_api import update_model_input_size
from visionmix.registry import is_int, is_list, is_number

MixerSpec = str | dict[str, Any]
_HEAD_DIM = 32
_PER_STAGE = ("embed_dims", "depths", "num_heads", "num_exchanges", "neck_dims")  # lists of integers
_POOLINGS = "give 'avg', 'max', 'avgmax' or 'catavgmax', or '' for none"


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """Return `x`, or raise ValueError where it is not a fitting batch of images (batch, in_chans, height, width).

    Scripted and compiled graphs skip the check: there it would cost a recompilation per size.
    """
    # Two conditions, since scripting drops a branch only where is_scripting stands alone.
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling():
            _check_images(x, in_chans, min_size)
    return x


def _check_images(x: Tensor, in_chans: int, min_size: int) -> None:
    shape = tuple(x.shape)
    if len(shape) != 4:
        remedy = "; add the batch axis with x[None]" if len(shape) == 3 else ""
        raise ValueError(f"x has shape {shape}; images have four axes (batch, in_chans, height, width){remedy}")
    if shape[1] != in_chans:
        raise ValueError(
            f"x has shape {shape}, so {shape[1]} channels, and the model takes in_chans={in_chans}; "
            f"build it with create_model(..., in_chans={shape[1]}) or convert the images"
        )
    if min(shape[2:]) < min_size:
        raise ValueError(f"x has shape {shape}: each side must be at least {min_size} pixels; enlarge the images")


class Backbone(nn.Module):
    """A stem, units one after another (stages or blocks), a norm and a head: the base of every skeleton.

    A skeleton builds its layers, then calls `_finish`. It gives `feature_info`, `forward_features`, `group_matcher`,
    `_resize`, and the four steps of a pass that keeps intermediate maps: `_enter`, `_advance`, `_cells`, `_leave`.

    Attributes:
        units: Name of the list of units.
        norms_every_unit: Whether the last norm fits the output of every unit, or of the last one only.
    """

    units: ClassVar[str]
    norms_every_unit: ClassVar[bool]
    output_fmt = "NHWC"
    feature_dim = -1  # the axis of channels in features, by which timm asks for it

    def _finish(
        self,
        num_features: int,
        head_layer: Callable[..., nn.Module],
        min_size: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **dd: Any,
    ) -> None:
        self.in_chans = in_chans
        self.min_size = min_size
        self.num_classes = num_classes
        self.num_features = num_features
        self.grad_checkpointing = False
        with _pooling(global_pool):
            self.head = head_layer(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if isinstance(self.head, TokenHead) and self.output_fmt == "NHWC":
            raise ValueError(
                "head_layer='token' reads a sequence with prefix tokens, and this model has none; leave it out"
            )
        self._note_hidden_size()
        if num_classes == 0 and global_pool:
            self.num_features = self.head_hidden_size  # the width of the result, as timm has it
        self.init_weights()

    @torch.jit.ignore
    def _note_hidden_size(self) -> None:
        # A head that projects before the classifier has that width as `hidden_size`.
        self.head_hidden_size = getattr(self.head, "hidden_size", self.num_features)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw every linear layer's weight from a truncated normal of deviation 0.02, its bias 0.

        A module with a method `init_layer_weights` then initialises its own parameters. On the meta device, where
        there are no values, nothing is drawn.
        """
        if next(self.parameters()).is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if hasattr(module, "init_layer_weights"):
                module.init_layer_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that optimisers should not decay.

        These are position embeddings, prefix tokens, and the parameters that a module names in its class attribute
        `undecayed`. An attribute of the parameters themselves would be lost in copies.
        """
        named = {
            f"{prefix}.{leaf}" if prefix else leaf
            for prefix, module in self.named_modules()
            for leaf in getattr(module, "undecayed", ())
        }
        return {
            name for name, _ in self.named_parameters() if name in named or "pos_embed" in name or "class_token" in name
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass of every block for its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_progress(self, done: float) -> None:
        """Tell every layer that has a schedule which share of the training steps is done.

        The trainer calls it before every step. A layer with a schedule has a method `set_progress` too.

        Args:
            done: From 0 at the start to 1 at the end.

        Raises:
            TypeError: `done` is no number.
            ValueError: it is not between 0 and 1.
        """
        if not is_number(done):
            raise TypeError(f"done={done!r} is no number; give steps done / steps in all, from 0 to 1")
        if not 0 <= done <= 1:
            raise ValueError(f"done={done} is not a share of training; give steps done / steps in all, from 0 to 1")
        for module in self.modules():
            if module is not self and hasattr(module, "set_progress"):
                module.set_progress(done)

    @torch.jit.ignore
    def fitted_layers(self) -> list[nn.Module]:
        """Return the layers that `calibrate` fits: those with a method `calibrate`."""
        return [each for each in self.modules() if hasattr(each, "calibrate") and not isinstance(each, Backbone)]

    @torch.jit.ignore
    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Fit every layer that is fitted to data, such as a hash, to `images`, as many as one pass has memory for.

        A layer that is fitted has a method `calibrate`, called with its input, and keeps what it learns in buffers. One
        is fitted after another, in the order of a pass in evaluation mode, so each to what the fitted ones before it
        return. `visionmix train` does this before the first step.

        Args:
            images: (batch, in_chans, height, width), as the model takes them.

        Raises:
            TypeError: `images` is no tensor.
            ValueError: no layer is fitted to data, or `images` is not a fitting batch, is empty or not finite.
        """
        layers = self.fitted_layers()
        if not layers:
            raise ValueError(f"no layer of {type(self).__qualname__} is fitted to data; leave out calibrate()")
        if not isinstance(images, Tensor):
            raise TypeError(f"images is a {type(images).__name__}; give a tensor (batch, in_chans, height, width)")
        if images.numel() == 0 or not images.isfinite().all():
            state = "is empty" if images.numel() == 0 else "has values that are not finite"
            raise ValueError(f"images, of shape {tuple(images.shape)}, {state}; give images as the model is trained on")
        training = {each: each.training for each in self.modules()}
        hooks = [each.register_forward_pre_hook(lambda layer, inputs: layer.calibrate(*inputs)) for each in layers]
        try:
            self.eval()
            self(images)
        finally:
            for hook in hooks:
                hook.remove()
            for each, mode in training.items():
                each.training = mode

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make `img_size` the size that size-tied tensors are stored at, by resampling them once.

        Windows and stripes that follow the map are set for it too, so that logits of such models change. The model's
        `pretrained_cfg` says the new size, and so does what `timm.models.save_for_hf` writes.

        Raises:
            TypeError: `img_size` is not a size in pixels.
            ValueError: it has other than two sides, or images would be smaller than a patch.
        """
        height, width = image_sides(img_size, self.min_size)
        pool_size = self._resize(height, width)
        update_model_input_size(self, (height, width))
        if hasattr(self, "pretrained_cfg"):
            # A new dict: a copy of the model shares the old one.
            size = {"input_size": (self.pretrained_cfg["input_size"][0], height, width), "pool_size": pool_size}
            self.pretrained_cfg = self.default_cfg = {**self.pretrained_cfg, **size}

    @torch.jit.ignore
    def _resize(self, height: int, width: int) -> tuple[int, int]:
        """Set every size-tied tensor for images of this size, and return the rows and columns of the last map."""
        raise NotImplementedError

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold norms that are affine in inference into the layers beside them, for inference, in place.

        ``timm.utils.reparameterize_model(model)`` does the same on a copy.
        """
        reparameterize_model(self, inplace=True)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of `num_classes` outputs (0: none), and the pooling if one is given.

        It has the device and type of the model's first convolution.

        Raises:
            TypeError: `num_classes` is no integer.
            ValueError: it is below 0, or `global_pool` is unknown.
        """
        check_integers(0, num_classes=num_classes)
        with _pooling(global_pool):
            self.head.reset(num_classes, global_pool)
        self.num_classes = num_classes
        self._note_hidden_size()
        like = next(value for value in self.parameters() if value.is_floating_point())
        self.head.to(like.device, like.dtype)

    def check(self, x: Tensor) -> Tensor:
        """Return `x`, images (batch, in_chans, height, width); raise ValueError for anything else."""
        return check_images(x, self.in_chans, self.min_size)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (batch, num_classes) of normalised features, or the classifier's input."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def _enter(self, x: Tensor) -> Any:
        """Return the state of a pass over images before the first unit."""
        raise NotImplementedError

    @torch.jit.ignore
    def _advance(self, unit: nn.Module, state: Any, index: int) -> Any:
        """Return the state after `unit`, number `index`."""
        raise NotImplementedError

    @torch.jit.ignore
    def _cells(self, state: Any, norm: bool) -> tuple[Tensor, Tensor]:
        """Return the map (batch, rows, columns, channels) and the prefix tokens, normalised if `norm`."""
        raise NotImplementedError

    @torch.jit.ignore
    def _leave(self, state: Any) -> Tensor:
        """Return the result of `forward_features` from the state after the last unit."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps after the chosen stages (of a plain model: blocks), alone or with `forward_features`' result.

        Args:
            x: Images (batch, in_chans, height, width).
            indices: Which stages or blocks: their numbers, how many of the last, or None for all.
            norm: Whether to apply the last norm: in a plain model to every map, else only to the last stage's, since
                the others have other widths.
            stop_early: Whether to skip everything after the last chosen one.
            output_fmt: Axes of the maps: "NCHW", "NHWC", or "NLC" with cells in row-major order.
            intermediates_only: Whether to return the maps alone.
            return_prefix_tokens: Whether each map comes in a pair with the prefix tokens (batch, count, channels).

        Raises:
            ValueError: `output_fmt` is none of the three, or there are fewer stages or blocks.
        """
        check_output_format(output_fmt)
        units = getattr(self, self.units)
        take, last = chosen_units(len(units), indices, self.units, "indices")
        state = self._enter(x)
        taken = []
        for index, unit in enumerate(units[: last + 1] if stop_early else units):
            state = self._advance(unit, state, index)
            if index in take:
                cells, prefix = self._cells(state, norm and (self.norms_every_unit or index == len(units) - 1))
                cells = laid_out(cells, output_fmt)
                taken.append((cells, prefix) if return_prefix_tokens else cells)
        return taken if intermediates_only else (self._leave(state), taken)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates(indices=...)` does not need; return the numbers of the chosen units.

        Raises:
            ValueError: there are fewer units.
        """
        units = getattr(self, self.units)
        take, last = chosen_units(len(units), indices, self.units)
        # Norm and head have the width of the last unit: without it they fit only where all are of one width.
        unfit = last < len(units) - 1 and not self.norms_every_unit
        setattr(self, self.units, units[: last + 1])
        if prune_norm or unfit:
            self.norm = nn.Identity()
        if prune_head or unfit:
            self.reset_classifier(0, "")
            if hasattr(self.head, "drop_projection"):
                self.head.drop_projection()
        if unfit:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    @torch.jit.ignore
    def _run_unit(self, unit: nn.Module, *arguments: Any) -> Any:
        return checkpoint(unit, *arguments) if self.grad_checkpointing else unit(*arguments)


def image_sides(img_size: int | Sequence[int], patch_size: int | None = None) -> tuple[int, int]:
    """Return the height and width that `img_size`, one number of pixels or two, stands for.

    Raises:
        TypeError: it is neither.
        ValueError: it has another length, or images are smaller than a patch.
    """
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if not all(map(is_int, sides)):
        raise TypeError(f"img_size={img_size!r} is not a size in pixels; give an integer, or (height, width)")
    if len(sides) != 2:
        raise ValueError(f"img_size={img_size!r} has {len(sides)} sides; give an integer, or (height, width)")
    if patch_size is not None and min(sides) < patch_size:
        raise ValueError(f"img_size={img_size} is smaller than patch_size={patch_size}; enlarge the images")
    return int(sides[0]), int(sides[1])


def heads_for(dim: int) -> int:
    """Return the number of heads whose width is nearest to 32 among multiples of 4, of 2, or of 1 that divide `dim`."""
    for step in (4, 2, 1):
        widths = [width for width in range(step, dim + 1, step) if dim % width == 0]
        if widths:
            return dim // min(widths, key=lambda width: abs(math.log(width / _HEAD_DIM)))
    return 1


def per_block(value: Any, depth: int, name: str, *, where: str = "") -> list:
    """Return one entry per block: `value` itself for all, those of a list, or those of ``dict(cycle=[...])`` in turn.

    Raises:
        ValueError: a list has another length than there are blocks, or a cycle is empty.
    """
    if isinstance(value, Mapping) and set(value) == {"cycle"}:
        cycle = value["cycle"]
        if not is_list(cycle) or not cycle:
            raise ValueError(f"{name}={value!r} has no entries to go through; give dict(cycle=[...]) a list")
        return [cycle[index % len(cycle)] for index in range(depth)]
    if is_list(value) and len(value) != depth:
        raise ValueError(
            f"{name} has {len(value)} entries for the {depth} blocks{where}; give one per block, one for all, or "
            "dict(cycle=[...]) to go through a list again and again"
        )
    return list(value) if is_list(value) else [value] * depth


def per_stage(value: Any, count: int, name: str, of: str = "stage") -> list:
    """Return `count` values of the option called `name`: those of a list or tuple, or `value` itself for all.

    `of` says what each of them belongs to, for the message.

    Raises:
        ValueError: the list has another length.
    """
    if not is_list(value):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} {of}s; give one per {of}, or one for all")
    return list(value)


def check_integers(least: int, **values: Any) -> None:
    """Check that each of `values`, an integer or one for each stage, is at least `least`; None is not checked.

    Raises:
        TypeError: one is no integer; the message names it.
        ValueError: one is too small.
    """
    for name, value in values.items():
        several = name in _PER_STAGE and is_list(value)
        for each in value if several else (value,):
            if each is None:
                continue
            if not is_int(each):
                raise TypeError(f"{name}={value!r} is not of integers; give integers from {least} up")
            if each < least:
                raise ValueError(f"{name}={value!r} is too small; give integers from {least} up")


def check_lists(**values: Any) -> None:
    """Raise TypeError, with its name, at the first of `values` that is no list; None stands for not given."""
    for name, value in values.items():
        if value is not None and not is_list(value):
            raise TypeError(f"{name}={value!r} is no list; give one entry per stage")


def check_rates(**rates: Any) -> None:
    """Check that each of `rates` is a number from 0 to 1.

    Raises:
        TypeError: one is no number; the message names it.
        ValueError: one is outside.
    """
    for name, rate in rates.items():
        if not is_number(rate):
            raise TypeError(f"{name}={rate!r} is no number; give a rate from 0 to 1")
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate} is no rate; give a number from 0 to 1")


@contextmanager
def _pooling(global_pool: str | None) -> Iterator[None]:
    """Refuse a pooling by name where timm's head asserts that it knows it."""
    if global_pool is not None and not isinstance(global_pool, str):
        raise TypeError(f"global_pool={global_pool!r} is no name; {_POOLINGS}")
    try:
        yield
    except AssertionError as error:
        raise ValueError(f"global_pool={global_pool!r} is unknown; {_POOLINGS}") from error


def check_mixer(mixer: Any, nested: int = 1) -> None:
    """Check that `mixer` is a mixer's name, a dict of name and options, or lists of those, at most `nested` deep.

    Raises:
        TypeError: it is something else.
        ValueError: a dict has no name, or one of the options that the skeleton sets.
    """
    remedy = "give a name, dict(name=..., options), or a list of those"
    if is_list(mixer):
        if nested == 0:
            raise TypeError(f"mixer={mixer!r} is a list where one mixer is wanted; {remedy}")
        for each in mixer:
            check_mixer(each, nested - 1)
    elif isinstance(mixer, Mapping) and set(mixer) == {"cycle"} and nested:
        for each in mixer["cycle"] if is_list(mixer["cycle"]) else ():  # see `per_block`
            check_mixer(each, 0)
    elif isinstance(mixer, Mapping):
        if "name" not in mixer:
            raise ValueError(f"mixer={mixer!r} has no 'name'; {remedy}")
        for option in ("dim", "device", "dtype"):
            if option in mixer:
                raise ValueError(f"mixer={mixer!r}: the model sets {option}; leave it out")
    elif not isinstance(mixer, str):
        raise TypeError(f"mixer={mixer!r} is not a mixer; {remedy}")


def set_grid_size(module: nn.Module, grid_size: tuple[int, int]) -> None:
    """Make `grid_size` the size that the size-tied tensors inside `module` are stored at."""
    for each in module.modules():
        if hasattr(each, "set_grid_size"):
            each.set_grid_size(grid_size)

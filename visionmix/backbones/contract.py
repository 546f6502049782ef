"""What timm asks of every model, once, for both skeletons."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionmix.mixers.registry import create_mixer, mixer_options

MixerSpec = str | dict[str, Any]


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, min_size: int) -> Tensor:
    """Return `x`, or raise ValueError where it is no batch of images (batch, in_chans, height, width) that fits.

    Scripted and compiled graphs skip the check: there it would cost a recompilation a size.
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
        raise ValueError(f"x has shape {shape}; it needs the four axes (batch, in_chans, height, width){remedy}")
    if shape[1] != in_chans:
        raise ValueError(
            f"x has shape {shape}, so {shape[1]} channels, and the model takes in_chans={in_chans}; "
            f"build it with create_model(..., in_chans={shape[1]}) or convert the images"
        )
    if min(shape[2:]) < min_size:
        raise ValueError(f"x has shape {shape}: each side must be at least {min_size} pixels; enlarge the images")


class Backbone(nn.Module):
    """The classifier, its reset, grouping, weight decay and checkpointing; a skeleton adds the trunk.

    A skeleton builds its layers, then calls `_finish`. It gives `feature_info` and the methods `forward_features`,
    `forward_intermediates`, `prune_intermediate_layers` and `group_matcher`.
    """

    output_fmt = "NHWC"
    feature_dim = -1  # the axis of channels in features, by which timm asks for it

    def _finish(
        self,
        num_features: int,
        *,
        head_layer: Callable[..., nn.Module],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        min_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.in_chans = in_chans
        self.min_size = min_size
        self.num_classes = num_classes
        self.num_features = num_features
        self.grad_checkpointing = False
        self.head = head_layer(
            num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        # A head that projects before the classifier says to what width.
        self.head_hidden_size = getattr(self.head, "hidden_size", num_features)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw every linear layer's weight from a truncated normal of deviation 0.02, its bias 0.

        A module with a method `init_layer_weights` then sets what it wants otherwise.
        """
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

        These are the embeddings of positions and of class tokens, and of any module with a class attribute `undecayed`
        the parameters that it names. An attribute of the parameters themselves would not outlive a copy.
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
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of `num_classes` outputs (0: none), and the pooling if one is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def _prune_head(self) -> None:
        """Drop what stands behind the features."""
        self.reset_classifier(0, "")
        if hasattr(self.head, "drop_projection"):
            self.head.drop_projection()

    def check(self, x: Tensor) -> Tensor:
        """Return `x`, images (batch, in_chans, height, width); raise ValueError where it is anything else."""
        return check_images(x, self.in_chans, self.min_size)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (batch, num_classes) of normalised features, or what the classifier would receive."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def build_mixer(
    spec: MixerSpec,
    dim: int,
    *,
    num_heads: int,
    grid_size: tuple[int, int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Return the mixer that `spec`, a name or a dict of name and options, describes.

    A mixer that takes `num_heads`, or `grid_size` (rows and columns of the map at the built image size), is given them.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise ValueError(f"mixer={spec!r} has no 'name'; give a name or dict(name=..., options)")
    name = options.pop("name")
    known = mixer_options(name)
    for option, value in (("num_heads", num_heads), ("grid_size", grid_size)):
        if option in known:
            options.setdefault(option, value)
    return create_mixer(name, dim, device=device, dtype=dtype, **options)


def mixer_per_block(mixer: MixerSpec | list[MixerSpec], depth: int) -> list[MixerSpec]:
    """Return one mixer a block: `mixer` itself for all, or a list's entries in turn."""
    if isinstance(mixer, str | dict):
        return [mixer] * depth
    if not isinstance(mixer, list | tuple) or not mixer:
        raise TypeError(f"mixer={mixer!r} is no mixer; give a name, dict(name=..., options), or a list of those")
    return [mixer[index % len(mixer)] for index in range(depth)]


def one_each(value: Any, count: int, name: str, what: str = "stage") -> list:
    """Return `count` values of the option called `name`: those of a list or tuple, or `value` itself for all.

    Raises:
        ValueError: the list has another length.
    """
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} {what}s; give one a {what}, or one for all")
    return list(value)


def with_ratio(mlp_layer: Callable[..., nn.Module] | None, mlp_ratio: float | None) -> Callable[..., nn.Module] | None:
    """Return `mlp_layer` with that ratio of hidden width, where one is given."""
    return mlp_layer if mlp_layer is None or mlp_ratio is None else partial(mlp_layer, mlp_ratio=mlp_ratio)


def set_grid_size(module: nn.Module, grid_size: tuple[int, int]) -> None:
    """Make `grid_size` the size that the size-tied tensors inside `module` are stored at."""
    for each in module.modules():
        if hasattr(each, "set_grid_size"):
            each.set_grid_size(grid_size)


def check_output_format(output_fmt: str, known: Sequence[str] = ("NCHW", "NHWC")) -> None:
    """Raise ValueError unless `output_fmt` is one of `known`."""
    if output_fmt not in known:
        raise ValueError(f"output_fmt={output_fmt!r} is unknown; give {' or '.join(map(repr, known))}")

"""The models as backbones of mmdet 3, mmseg 1 and mmpretrain 1.

A config that holds ``custom_imports = dict(imports=["visionmix.integrations.openmmlab"])`` may then say
``backbone=dict(type="visionmix.Backbone", name="vmamba_tiny")``, and ``constructor="visionmix.LayerDecay"`` in its
`optim_wrapper`; see `visionmix.integrations.layer_decay`. ``sh tools/install_openmmlab.sh`` installs everything
that OpenMMLab needs with current PyTorch.
"""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visionmix import reduction as reductions
from visionmix.integrations.layer_decay import LayerDecayConstructor
from visionmix.integrations.pyramid import SimplePyramid
from visionmix.models.family import is_family_model
from visionmix.models.loading import load_checkpoint
from visionmix.reduction.refused import reason
from visionmix.reduction.specs import Spec
from visionmix.registry import nearest

__all__ = ["MODELS", "Backbone", "LayerDecayConstructor", "SimplePyramid"]

# A registry of this library's own below the root one: mmengine reads the dot of "visionmix.Backbone" as a scope.
MODELS = Registry("model", parent=ROOT, scope="visionmix")
MODELS.register_module(module=SimplePyramid)
MODELS.register_module("LN2d", module=LayerNorm2d)  # as `norm_cfg` of heads

# The norm after a stage's map, as published code of mmdet and mmseg calls it: outnorm0, norm0 or extra_norms.0.
_OUTPUT_NORM = re.compile(r"^(?:outnorm|norm|extra_norms\.)(\d+)\.(\w+)$")


@MODELS.register_module()
class Backbone(BaseModule):
    """A model of this library, or a ViT of timm, without its head: images to the maps of chosen stages.

    Shapes: (batch, in_chans, height, width), of any height and width, to a tuple of maps (batch, channels, rows,
    columns), one for each of `out_indices`. `channels` and `strides` hold each map's width, which a neck or head takes
    as its `in_channels`, and the pixels per side that one of its cells stands for.

    Hierarchical models give a pyramid, of strides 4, 8, 16 and 32 for most. Plain models have one resolution: their
    `out_indices` are blocks, and all their maps have the stride of the stem, 16 for most, which an FPN would silently
    take for a pyramid; so a plain model with several maps is built only if `one_stride` says that the neck or head
    takes maps of one size. UPerHead does; ``dict(type="mmseg.Feature2Pyramid", ...)`` makes a pyramid of four, and
    ``dict(type="visionmix.SimplePyramid", ...)`` one of the last alone.

    A detector or segmentation model with this backbone also loads what the family's authors published for theirs, by
    `load_from`, by ``--cfg-options load_from=FILE`` or by its `load_state_dict`: keys of the backbone are renamed as
    those of classifiers are, and a backbone that does not fit whole is refused.

    Args:
        name: Model, one of `visionmix.models.list_family_models()`, or a `VisionTransformer` of timm, such as
            "vit_small_patch16_224" or a name of `visionmix.reduction.register_model`; it is built for images of any
            size, and is else a plain model.
        pretrained: Whether to load the published weights, or the path of a file that holds them as published.
        out_indices: Numbers of the stages (of a plain model: blocks) whose maps are returned; None for all stages
            (of a plain model: the last three blocks).
        drop_path_rate: Rate of stochastic depth at the last block; it grows linearly from 0.
        norm_output: Whether a layer norm over channels follows each map, as in most published detection and
            segmentation code of such models.
        frozen_stages: -1 trains everything; 0 freezes the stem; n also the first n stages, each with its downsampler
            (of a plain model: the position embedding and the first n blocks). Frozen layers stay in eval mode. The
            norms of `norm_output` are trained always.
        one_stride: Whether maps of one stride are what the neck or head takes; see above.
        reduction: As `visionmix.reduction.apply` takes it, ``"tome:r=8"`` or ``dict(method="tome", r=8)``; the maps are
            dense all the same.
        init_cfg: mmengine's initialisation, for instance ``dict(type="Pretrained", checkpoint=...)`` for a file saved
            by mmengine.
        **options: Further arguments of `timm.create_model`: `mixer`, `img_size`, `in_chans` and others.

    Raises:
        TypeError: the model cannot be reduced.
        ValueError: `name` is unknown or another model of timm; `out_indices` or `frozen_stages` are out of range;
            several maps have one stride and `one_stride` does not allow it; both `pretrained` and `init_cfg` are given.
        FileNotFoundError: `pretrained` names no file.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str | PathLike = False,
        out_indices: Sequence[int] | None = None,
        *,
        drop_path_rate: float = 0.0,
        norm_output: bool = False,
        frozen_stages: int = -1,
        one_stride: bool = False,
        reduction: Spec | None = None,
        init_cfg: dict | list[dict] | None = None,
        **options: Any,
    ) -> None:
        _check_name(name)
        if pretrained and init_cfg:
            raise ValueError(f"pretrained={pretrained!r} and init_cfg={init_cfg!r} both set the weights; give one")
        super().__init__(init_cfg)
        if not isinstance(pretrained, bool):
            path = Path(pretrained).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"pretrained={str(pretrained)!r} is not a file; give True, False or a path")
            options["pretrained_cfg_overlay"] = {"file": str(path)}
            if not is_family_model(name):
                options["pretrained_cfg_overlay"]["custom_load"] = path.suffix == ".npz"
        if not is_family_model(name):
            options = {"dynamic_img_size": True, "dynamic_img_pad": True, **options}
        if out_indices is not None:
            options["out_indices"] = check_indices(out_indices)
        try:
            # The wrapper also keeps the model's own init_weights, which would undo `pretrained`, from mmengine.
            self.features = timm.create_model(
                name, bool(pretrained), features_only=True, drop_path_rate=drop_path_rate, **options
            )
        except AssertionError as error:  # timm's own range check
            raise ValueError(f"out_indices={out_indices!r} does not fit {name}: {error}") from error
        if reduction is not None:
            self.features = reductions.apply(self.features, reduction)
        self.channels: list[int] = self.features.feature_info.channels()
        self.strides: list[int] = self.features.feature_info.reduction()
        if len(set(self.strides)) < len(self.strides) and not one_stride:
            raise ValueError(
                f"name={name!r} gives maps of strides {self.strides}, which do not form a pyramid; choose a "
                "hierarchical model or one map, or set one_stride=True where the neck or head takes maps of one size"
            )
        self.frozen_stages = frozen_stages
        self._frozen = self._layers_to_freeze(name)
        for layer in self._frozen:
            layer.requires_grad_(False)
        if self._frozen and not is_family_model(name):
            for parameter in self.features.model.parameters(recurse=False):  # of positions and prefix tokens
                parameter.requires_grad_(False)
        norms = [LayerNorm2d(width, eps=1e-5) if norm_output else nn.Identity() for width in self.channels]
        self.norms = nn.ModuleList(norms)
        self.name, self.norm_output = name, norm_output
        if is_family_model(name):
            self.register_load_state_dict_pre_hook(_rename_published)

    def _layers_to_freeze(self, name: str) -> list[nn.Module]:
        model = self.features.model
        stages = getattr(model, "stages", None)
        steps = list(model.blocks if stages is None else stages)
        if not -1 <= self.frozen_stages <= len(steps):
            raise ValueError(
                f"frozen_stages={self.frozen_stages} is out of range: {name} has {len(steps)} "
                f"{'blocks' if stages is None else 'stages'} up to the last of out_indices; give -1 to {len(steps)}"
            )
        if self.frozen_stages < 0:
            return []
        parts = (getattr(model, part, None) for part in ("stem", "pos_embed", "patch_embed", "norm_pre"))
        return [part for part in parts if isinstance(part, nn.Module)] + steps[: self.frozen_stages]

    def train(self, mode: bool = True) -> "Backbone":
        """Set training or eval mode; frozen layers stay in eval mode."""
        super().train(mode)
        for layer in self._frozen:
            layer.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps (batch, channels, rows, columns) of images (batch, in_chans, height, width)."""
        return tuple(norm(features) for norm, features in zip(self.norms, self.features(x), strict=True))


def _check_name(name: str) -> None:
    """Raise ValueError unless `name` is a model of this library or a VisionTransformer of timm."""
    if is_family_model(name):
        return
    if not timm.is_model(name.partition(".")[0]):
        hint = nearest(name.partition(".")[0], timm.list_models())
        raise ValueError(
            f"name={name!r} is not a model of visionmix or timm{hint}; visionmix.models.list_models() and "
            f'timm.list_models("vit_*") list those that can be a backbone'
        )
    with torch.device("meta"):
        made = type(timm.create_model(name))
    if not issubclass(made, VisionTransformer):
        known = reason(made)
        since = f", and it cannot be reduced, since {known}" if known else ""
        raise ValueError(
            f"name={name!r} is a {made.__qualname__} of timm, which mmseg.TIMMBackbone takes{since}; give a model of "
            f"visionmix, or of timm's one of class VisionTransformer, such as vit_small_patch16_224"
        )


def check_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices)):
        raise ValueError(f"out_indices={out_indices!r} must be stage numbers in rising order, each once")
    return indices


def _rename_published(backbone: Backbone, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Put the tensors of a published detector's backbone, which begin with `prefix`, under the names of `backbone`.

    Raises:
        ValueError: they are not those of this model, whole.
    """
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not given or any(key.startswith("features.") for key in given):
        return
    for key in given:
        del state[prefix + key]
    stages = list(backbone.features.feature_info.out_indices)
    if backbone.norm_output:
        for match in filter(None, map(_OUTPUT_NORM.match, list(given))):
            value = given.pop(match[0])
            if int(match[1]) in stages:  # the norm of a map that nobody reads is left out
                state[f"{prefix}norms.{stages.index(int(match[1]))}.{match[2]}"] = value
    model = backbone.features.model
    load_checkpoint(model, given, name=backbone.name)
    state.update({f"{prefix}features.model.{key}": value for key, value in model.state_dict().items()})

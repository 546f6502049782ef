"""The forward paths of reduced models, one class per skeleton; each is mixed with the class of the model it reduces."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from visionmix.backbones import Plain
from visionmix.backbones.intermediates import check_output_format, chosen_units, laid_out
from visionmix.layers import join_prefix
from visionmix.reduction.methods import Method
from visionmix.reduction.sharing import Reduced, share
from visionmix.reduction.tokens import Tokens


class ReducedBackbone(Reduced):
    """A backbone whose blocks are run by a reduction method; a subclass knows one skeleton's stem and output.

    Attributes:
        reduction: The method.
        whole_depth: Number of blocks of the whole model, those that a feature extractor has left off among them.
    """

    skeleton: ClassVar[type[nn.Module]]
    paths: ClassVar[tuple[str, ...]]
    reduction: Method
    whole_depth: int
    blocks: nn.ModuleList | nn.Sequential
    norm: nn.Module
    grad_checkpointing: bool

    @staticmethod
    def prefix_of(model: nn.Module) -> tuple[int, ...]:
        """Return the positions of the prefix tokens of `model`."""
        raise NotImplementedError

    @staticmethod
    def stages_of(model: nn.Module) -> list[list[nn.Module]]:
        """Return the blocks of `model`, those together that run at one resolution."""
        return [list(model.blocks)]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """Drop what the chosen features do not need, as the model does; blocks keep their numbers in the method."""
        kept = super().prune_intermediate_layers(*args, **kwargs)
        self.reduction = self.reduction.cut(sum(map(len, self.stages_of(self))))
        return kept

    def _embed_tokens(self, images: Tensor, trace: bool) -> Tokens:
        raise NotImplementedError

    def forward_tokens(self, images: Tensor) -> Tokens:
        """Return the tokens that are left after the last block, normalised, with their sizes.

        With ``trace_source=True`` they say which token holds which cell, `Tokens.source`, and `Tokens.cells` gives one
        token a cell.

        Args:
            images: (batch, channels, height, width).
        """
        tokens, _ = self._run(images, trace=self.reduction.trace_source)
        return self._normalised(tokens)

    def run_with(self, method: Method, images: Tensor) -> Tokens:
        """Return the tokens after the last block, before its norm, where `method` reduces in place of `reduction`."""
        tokens = method.begin(self._embed_tokens(images, False))
        for index, block in enumerate(self.blocks):
            tokens = method.step(block, tokens, index)
        return method.end(tokens)

    def _run(
        self, images: Tensor, trace: bool, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens after block `last` (None: the last one), and those after each of the blocks `take`."""
        tokens = self.reduction.begin(self._embed_tokens(images, trace))
        taken = []
        for index, block in enumerate(self.blocks if last is None else self.blocks[: last + 1]):
            tokens = self._step(block, tokens, index)
            if index in take:
                taken.append(tokens)
        return tokens, taken

    def _step(self, block: nn.Module, tokens: Tokens, index: int) -> Tokens:
        step = self.reduction.train_step if self.training else self.reduction.step
        tokens = checkpoint(step, block, tokens, index) if self.grad_checkpointing else step(block, tokens, index)
        return self.reduction.end(tokens) if index == self.whole_depth - 1 else tokens

    @property
    def forward_train(self) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        """Return a function of images that returns logits and the method's own losses, scalars by name.

        Raises:
            AttributeError: the method has no losses.
        """
        if not self.reduction.has_losses:
            raise AttributeError(f"method {self.reduction.name!r} has no losses of its own, so no forward_train")
        return self._forward_train

    def _forward_train(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, _ = self._run(images, trace=self._pools_cells() or self.reduction.trace_source)
        logits = self.forward_head(self._features(tokens))
        return logits, self.reduction.losses(self, images, tokens)

    def _pools_cells(self) -> bool:
        """Return whether the head pools over the cells' tokens."""
        raise NotImplementedError

    def _features(self, tokens: Tokens) -> Tensor:
        """Return the head's input: the normalised tokens, one per cell where it pools over those of several sizes."""
        raise NotImplementedError

    def _normalised(self, tokens: Tokens) -> Tokens:
        rest = None if tokens.rest is None else self.norm(tokens.rest)
        return tokens._replace(x=self.norm(tokens.x), rest=rest)

    def extra_repr(self) -> str:
        return repr(self.reduction)


def source_of(images: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Return `Tokens.source` of a whole map whose cells come behind `prefix` tokens."""
    cells = torch.arange(prefix, prefix + grid[0] * grid[1], device=images.device)
    return cells.expand(images.shape[0], -1)


class ReducedVisionTransformer(ReducedBackbone):
    """timm's VisionTransformer, VisionTransformerDistilled included, with fewer and fewer tokens.

    `forward_features` gives the tokens that are left, (batch, tokens, channels). Where the head pools over patches and
    tokens have been merged, it gives one token per cell instead, so that each counts as often as it has cells.
    Intermediate features are always dense: one value per cell.
    """

    skeleton = VisionTransformer
    paths = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")

    @staticmethod
    def prefix_of(model: nn.Module) -> tuple[int, ...]:
        return tuple(range(model.num_prefix_tokens))

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        self.patch_embed = share(self.patch_embed)  # so that the given model keeps its size
        super().set_input_size(*args, **kwargs)

    def _embed_tokens(self, images: Tensor, trace: bool) -> Tokens:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        grid = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        prefix = self.num_prefix_tokens
        if not trace:
            return Tokens(x, grid, tuple(range(prefix)))
        if x.shape[1] != prefix + grid[0] * grid[1]:
            raise ValueError(
                f"patch_drop_rate={self.patch_drop.prob} leaves {x.shape[1] - prefix} tokens for "
                f"{grid[0]}x{grid[1]} cells in training; dense features and traces need all: call eval() or build the "
                f"model with patch_drop_rate=0"
            )
        return Tokens(x, grid, tuple(range(prefix)), source=source_of(images, grid, prefix))

    def _pools_cells(self) -> bool:
        return self.attn_pool is not None or self.global_pool in ("avg", "avgmax", "max")

    def _features(self, tokens: Tokens) -> Tensor:
        tokens = self._normalised(tokens)
        if (tokens.size is None and tokens.mask is None) or not self._pools_cells():
            return tokens.x
        return torch.cat([tokens.prefix(), tokens.cells()], dim=1)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the normalised tokens (batch, tokens, channels) of images (batch, channels, height, width).

        Raises:
            ValueError: an attention mask is given.
        """
        _check_unmasked(attn_mask, is_causal)
        tokens, _ = self._run(x, trace=self._pools_cells())
        return self._features(tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Return dense features after the chosen blocks, alone or with the result of `forward_features`.

        Every cell has the value of the token that holds it; a cell whose token was dropped has its last value.

        Args:
            x: Images (batch, channels, height, width).
            indices: Which blocks: their numbers, how many of the last, or None for all.
            return_prefix_tokens: Whether to return pairs of features and prefix tokens.
            norm: Whether to apply the last norm to all of them.
            stop_early: Whether to skip the blocks after the last chosen one.
            output_fmt: Axes of the features: "NCHW", "NHWC" or "NLC".
            intermediates_only: Whether to return the features alone.
            output_dict: Whether to return a dict with 'image_intermediates' and, where asked for,
                'image_intermediates_prefix', 'image_features' and 'image_source' (`Tokens.source` after each of the
                blocks, with ``trace_source=True``).
            attn_mask: Must be None.
            is_causal: Must be False.

        Raises:
            ValueError: an attention mask is given, or `output_fmt` is none of the three.
        """
        _check_unmasked(attn_mask, is_causal)
        check_output_format(output_fmt)
        take, last = chosen_units(len(self.blocks), indices, "blocks", "indices")
        tokens, taken = self._run(x, trace=True, take=take, last=last if stop_early else None)
        if norm:
            taken = [self._normalised(each) for each in taken]
        features: list = [laid_out(each.map(), output_fmt) for each in taken]
        prefix = [each.prefix() for each in taken] if return_prefix_tokens and self.num_prefix_tokens else None
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": features}
            if prefix is not None:
                found["image_intermediates_prefix"] = prefix
            if self.reduction.trace_source:
                found["image_source"] = [each.source for each in taken]
            if not intermediates_only:
                found["image_features"] = self._features(tokens)
            return found
        if prefix is not None:
            features = list(zip(features, prefix, strict=True))
        return features if intermediates_only else (self._features(tokens), features)


class ReducedPlain(ReducedBackbone):
    """This library's plain skeleton with fewer and fewer tokens; its maps are dense, one value per cell.

    With a class token `forward_features` gives the tokens that are left, (batch, tokens, embed_dim); where the head
    pools over cells and tokens have been merged, one token per cell, so that each counts as often as it has cells.
    """

    skeleton = Plain
    paths = ("forward", "forward_features", "forward_intermediates", "embed")

    @staticmethod
    def prefix_of(model: nn.Module) -> tuple[int, ...]:
        rows, columns = model.grid_size
        return tuple(model.class_token.positions(rows * columns)) if model.has_prefix else ()

    def _embed_tokens(self, images: Tensor, trace: bool) -> Tokens:
        x, grid = self.embed(images)
        source = source_of(images, (grid.height, grid.width), 0) if trace else None
        for position in grid.prefix_positions if trace else ():
            source = source + (source >= position)
        return Tokens(x, (grid.height, grid.width), tuple(grid.prefix_positions), source=source)

    def _pools_cells(self) -> bool:
        return not self.has_prefix or self.head.pool_type != "token"

    def _features(self, tokens: Tokens) -> Tensor:
        tokens = self._normalised(tokens)
        if not self.has_prefix:
            return tokens.map()
        if (tokens.size is None and tokens.mask is None) or not self._pools_cells():
            return self._placed(tokens)
        positions = self.class_token.positions(tokens.grid[0] * tokens.grid[1])
        return join_prefix(tokens.cells(), tokens.prefix(), positions)

    def _placed(self, tokens: Tokens) -> Tensor:
        """Return the tokens with those of the prefix where the head looks for them."""
        positions = self.class_token.positions(tokens.x.shape[1] - len(tokens.prefix_positions))
        if tuple(positions) == tokens.prefix_positions:
            return tokens.x
        rest = [place for place in range(tokens.x.shape[1]) if place not in tokens.prefix_positions]
        return join_prefix(tokens.x[:, rest], tokens.prefix(), positions)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised map (batch, rows, columns, embed_dim) of images (batch, in_chans, height, width).

        With prefix tokens the tokens that are left, (batch, tokens, embed_dim).
        """
        tokens, _ = self._run(x, trace=self._pools_cells() or self.reduction.trace_source)
        return self._features(tokens)

    # The steps of the skeleton's forward_intermediates.

    def _enter(self, x: Tensor) -> Tokens:
        return self.reduction.begin(self._embed_tokens(x, trace=True))

    def _advance(self, unit: nn.Module, state: Tokens, index: int) -> Tokens:
        return self._step(unit, state, index)

    def _cells(self, state: Tokens, norm: bool) -> tuple[Tensor, Tensor]:
        state = self._normalised(state) if norm else state
        return state.map(), state.prefix()

    def _leave(self, state: Tokens) -> Tensor:
        return self._features(state)


def _check_unmasked(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal refer to tokens that a reduced model no longer has; leave them out")

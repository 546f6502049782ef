"""The forward paths of reduced hierarchical models."""

from collections.abc import Collection
from typing import Any

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from visionmix.backbones import Hierarchical, Stage
from visionmix.reduction.backbones import ReducedBackbone, source_of
from visionmix.reduction.tokens import Tokens


class ReducedHierarchical(ReducedBackbone):
    """This library's hierarchical skeleton, whose stages run on fewer and fewer tokens.

    At its end every stage gives a whole map, on which the next one begins: a cell whose token was dropped has its last
    value. `forward_features` and `forward_intermediates` are those of the given model.
    """

    skeleton = Hierarchical
    paths = ("forward", "forward_features", "forward_intermediates")

    @staticmethod
    def prefix_of(model: nn.Module) -> tuple[int, ...]:
        return ()

    @staticmethod
    def stages_of(model: nn.Module) -> list[list[nn.Module]]:
        for stage in model.stages:
            if type(stage).forward is not Stage.forward:
                raise TypeError(
                    f"a stage of class {type(stage).__qualname__} cannot be reduced, since it has a forward of its own"
                )
        return [list(stage.blocks) for stage in model.stages]

    def _run(
        self, images: Tensor, trace: bool, take: Collection[int] = (), last: int | None = None
    ) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens after stage `last` (None: the last one), and those after each of the stages `take`."""
        x, taken = self.stem(self.check(images)), []
        for index, stage in enumerate(self.stages if last is None else self.stages[: last + 1]):
            tokens = self._run_stage(stage, x, index)
            x = _whole(tokens)
            if index in take:
                taken.append(tokens)
        return tokens, taken

    def _run_stage(self, stage: nn.Module, x: Tensor, index: int) -> Tokens:
        x = stage.pos_embed(stage.downsample(x))
        grid = (x.shape[1], x.shape[2])
        tokens = self.reduction.begin(Tokens(x.flatten(1, 2), grid, source=source_of(x, grid, 0)))
        step = self.reduction.train_step if self.training else self.reduction.step
        first = sum(len(each.blocks) for each in self.stages[:index])
        for number, block in enumerate(stage.blocks, first):
            arguments = (block, tokens, number)
            tokens = checkpoint(step, *arguments) if stage.grad_checkpointing else step(*arguments)
        tokens = self.reduction.end(tokens)
        rest = None if tokens.rest is None else stage.norm(tokens.rest)
        return tokens._replace(x=stage.norm(tokens.x), rest=rest)

    def _pools_cells(self) -> bool:
        return True

    def _features(self, tokens: Tokens) -> Tensor:
        return self.norm(_whole(tokens))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised last map (batch, rows, columns, embed_dims[-1])."""
        return self._features(self._run(x, True)[0])

    @torch.jit.ignore
    def _advance(self, unit: nn.Module, state: tuple[Tensor, Any], index: int) -> tuple[Tensor, Any]:
        x, carry = state
        return _whole(self._run_stage(unit, x, index)), carry


def _whole(tokens: Tokens) -> Tensor:
    """Return the map (batch, rows, columns, channels); as it is where no token was dropped."""
    return tokens.x.unflatten(1, tokens.grid) if tokens.position is None else tokens.map()

"""The network that chooses how many learners a token needs."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from visionmix.layers import at_least_float32
from visionmix.registry import check_positive, is_int


class GatingNetwork(nn.Module):
    """Logits of the choices 0, ..., num_choices - 1 for each token, and a choice from them.

    In evaluation a token's choice is the one of the largest logit. In training it is drawn by the straight-through
    Gumbel softmax: a one-hot vector in the forward pass, whose gradient is that of
    ``softmax((logits + noise) / temperature)``.

    Shapes: (..., dim) to (..., num_choices) for `logits` and `sample`, to int64 (...) for `forward`.

    Source: adaptive computation modules (Wójcik et al. 2023, arXiv 2312.10193). Parameters have the names of the
    published code: `fc` for one layer, `net` for several.

    Args:
        dim: Channels of the tokens.
        num_choices: Number of choices.
        hidden_dims: Widths between `dim` and the logits. No activation stands between the layers, as published, so
            that they compute no more than one layer does, and train otherwise.
        min_choice: Least choice; the logits of those below are -inf.
        temperature: Of the Gumbel softmax; 0.8 is published for ViT-B.

    Raises:
        TypeError: `min_choice` or a width is no int, or `temperature` no number.
        ValueError: `min_choice` leaves no choice, or a width or `temperature` is not above 0.
    """

    def __init__(
        self,
        dim: int,
        num_choices: int,
        *,
        hidden_dims: Sequence[int] = (),
        min_choice: int = 0,
        temperature: float = 0.8,
        **dd: Any,
    ) -> None:
        super().__init__()
        if not is_int(min_choice):
            raise TypeError(f"min_choice={min_choice!r}: give an int")
        if not 0 <= min_choice < num_choices:
            raise ValueError(f"min_choice={min_choice}: give 0 to {num_choices - 1}, the largest choice")
        if not isinstance(hidden_dims, list | tuple) or not all(is_int(width) for width in hidden_dims):
            raise TypeError(f"hidden_dims={hidden_dims!r}: give a list of widths, or () for one layer")
        if not all(width > 0 for width in hidden_dims):
            raise ValueError(f"hidden_dims={hidden_dims!r}: give widths above 0")
        check_positive(temperature=temperature)
        self.num_choices, self.min_choice, self.temperature = num_choices, min_choice, temperature
        widths = [dim, *hidden_dims, num_choices - min_choice]
        layers = [nn.Linear(a, b, **dd) for a, b in itertools.pairwise(widths)]
        if hidden_dims:
            self.net = nn.Sequential(*layers)
        else:
            self.fc = layers[0]

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., num_choices), in float32 at least."""
        logits = at_least_float32(self.fc(x) if hasattr(self, "fc") else self.net(x))
        return F.pad(logits, [self.min_choice, 0], value=-math.inf)

    def sample(self, x: Tensor) -> Tensor:
        """Return drawn choices as one-hot vectors (..., num_choices), with straight-through gradients."""
        return F.gumbel_softmax(self.logits(x), tau=self.temperature, hard=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).argmax(dim=-1)

    def extra_repr(self) -> str:
        return f"num_choices={self.num_choices}, min_choice={self.min_choice}, temperature={self.temperature}"

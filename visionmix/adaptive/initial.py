"""Learners that begin with what the weights of a trained layer say."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from visionmix.adaptive.module import ACM
from visionmix.layers import at_least_float32


@torch.no_grad()
def begin_with(acm: ACM, layer: nn.Module, rows: slice = slice(None)) -> None:
    """Give `acm` the weights of `layer`, its most important part first.

    Of a feed-forward, each learner takes some of its hidden channels, those with the largest product of their weights'
    norms on both sides first: with as many channels as `layer`, all learners together are `layer`. Of a linear layer,
    each takes some of its singular vectors, the largest first, so that no other module of its form is closer with any
    number of learners, by the norm of the weights' difference. The bias of the result is there with 0 learners already.

    Args:
        acm: The module.
        layer: A feed-forward of timm or a linear layer.
        rows: Those of the linear layer that the module stands for.

    Raises:
        TypeError: `layer` is another one, or has a norm between its two linear layers.
        ValueError: `acm` has no place for the biases, or more hidden channels than `layer` gives.
    """
    if isinstance(layer, nn.Linear):
        bias, hidden_bias = layer.bias, None
        u, s, v = torch.linalg.svd(at_least_float32(layer.weight[rows]), full_matrices=False)
        into, out = v * s.sqrt().unsqueeze(1), (u * s.sqrt()).t()
    elif isinstance(layer, Mlp) and isinstance(layer.fc1, nn.Linear) and isinstance(layer.norm, nn.Identity):
        bias, hidden_bias = layer.fc2.bias, layer.fc1.bias
        order = (layer.fc1.weight.norm(dim=1) * layer.fc2.weight.norm(dim=0)).argsort(descending=True)
        into, out = layer.fc1.weight[order], layer.fc2.weight.t()[order]
        hidden_bias = None if hidden_bias is None else hidden_bias[order]
    else:
        raise TypeError(f"init='weights' cannot divide a {type(layer).__qualname__} into learners; give init='random'")
    if (bias is not None and acm.b2 is None) or (hidden_bias is not None and acm.b1 is None):
        raise ValueError("init='weights' needs a place for each bias; give hidden_bias=True and out_bias=True")
    width = acm.w1.shape[1]
    if width > into.shape[0]:
        raise ValueError(
            f"init='weights' has {into.shape[0]} hidden channels to give, and the learners have {width}; give a "
            f"smaller cost, or init='random'"
        )
    acm.w1.copy_(into[:width].t())
    acm.w2.copy_(out[:width])
    _fill(acm.b1, hidden_bias)
    _fill(acm.b2, None if bias is None else bias[rows])


def _fill(parameter: Tensor | None, values: Tensor | None) -> None:
    """Set `parameter` to as many of `values` as it has room for, and zeros behind them."""
    if parameter is not None:
        parameter.zero_()
        if values is not None:
            count = min(parameter.numel(), values.numel())
            parameter[:count] = values[:count]

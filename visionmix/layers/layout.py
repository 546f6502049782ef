"""The order of a map's axes in memory."""

from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """Return x (batch, height, width, channels) as (batch, channels, height, width), dense in that order.

    For convolutions that mix channels: given a permuted view, PyTorch on a CPU copies the weight into the view's order
    at every call, beside oneDNN's own copy. At the weights' size that costs more than a copy of the map, and memory of
    twice that size goes back to the system each time: vmamba_tiny met 5,000 page faults an image. Where the weights
    lie in channels-last order (``model.to(memory_format=torch.channels_last)``) neither is copied.
    """
    return x.permute(0, 3, 1, 2).contiguous()

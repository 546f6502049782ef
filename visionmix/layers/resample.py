"""Maps at other sizes."""

import torch
import torch.fx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from visionmix.layers.precision import at_least_float32


def resample_map(x: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Return x (batch, rows, columns, channels) resampled to (batch, height, width, channels).

    In float32 at least, without antialiasing, corners not aligned; bit for bit the identity at the size of `x`.

    Args:
        x: The map.
        height: Rows wanted.
        width: Columns wanted.
        mode: "bicubic" or "bilinear".
    """
    return _resample_map(x, height, width, mode)  # torch.fx.wrap finds a function by the name in its own module alone


@torch.fx.wrap
def _resample_map(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    if torch.jit.is_scripting():
        if height == x.shape[1] and width == x.shape[2]:
            return x
    else:
        # A graph compiled for all sizes resamples always (the weights at scale 1 are 0 and 1 exactly): a branch on the
        # size would compile once more for the built size.
        # torch.jit.trace makes tensors of sizes, which are compared as they are.
        if all(same if isinstance(same, Tensor) else statically_known_true(same)
               for same in (height == x.shape[1], width == x.shape[2])):  # fmt: skip
            return x
        if torch.compiler.is_exporting():
            # ONNX Runtime moves permutations past a resampling, and then cannot make the map, its channels last, any
            # smaller. It moves none past a change of shape.
            maps = at_least_float32(x.permute(0, 3, 1, 2)).flatten(0, 1).unsqueeze(1)
            resampled = F.interpolate(maps, size=[height, width], mode=mode).squeeze(1).unflatten(0, (-1, x.shape[3]))
            return resampled.to(x.dtype).permute(0, 2, 3, 1)
    resampled = F.interpolate(at_least_float32(x.permute(0, 3, 1, 2)), size=[height, width], mode=mode)
    return resampled.to(x.dtype).permute(0, 2, 3, 1)

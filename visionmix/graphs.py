"""Rules of code that PyTorch turns into graphs: script, fx, compile, export.

- `torch.fx.wrap` keeps a function whole in a traced graph and finds it by its name, in its own module alone. A function
  for other modules therefore calls a wrapped one beside it, whose name begins with an underscore.
- TorchScript leaves a branch uncompiled only where `torch.jit.is_scripting()` is the whole condition: of an `and` or
  `or` it compiles both sides.
- A compiled graph that branches on a size is compiled once more for the other branch: see `may_branch_on_sizes`.

Every room may import this file; it imports none of them.
"""

import torch
from torch import Tensor

from visionmix.private_api import inside_functorch


def may_branch_on_sizes() -> bool:
    """Return whether code may look at sizes to save work: everywhere but in a graph that is being compiled."""
    return torch.jit.is_scripting() or not torch.compiler.is_compiling()


def may_keep(x: Tensor) -> bool:
    """Return whether tensors that follow from sizes alone may be kept, to be used with `x` and in later calls.

    That is for ordinary tensors on the CPU, where many small ops cost more than memory. Nothing may be kept where it
    becomes part of a graph, nor under torch.func's transforms, which wrap what is made under them. What is kept is made
    outside inference mode: a tensor of inference mode could not take part in a later training step.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or inside_functorch():
        return False
    return type(x) is Tensor and x.device.type == "cpu"

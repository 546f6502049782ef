"""Rules of code that PyTorch turns into graphs: script, fx, compile, export.

- `torch.fx.wrap` keeps a function whole in a traced graph and finds it by its name, in its own module alone. A function
  for other modules therefore calls a wrapped one beside it, whose name begins with an underscore.
- TorchScript leaves a branch uncompiled only where `torch.jit.is_scripting()` is the whole condition: of an `and` or
  `or` it compiles both sides.
- A compiled graph that branches on a size is compiled once more for the other branch: see `may_branch_on_sizes`.

Every room may import this file; it imports none of them.
"""

import torch


def may_branch_on_sizes() -> bool:
    """Return whether code may look at sizes to save work: everywhere but in a graph that is being compiled."""
    return torch.jit.is_scripting() or not torch.compiler.is_compiling()

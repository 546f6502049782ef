"""The memory that a piece of PyTorch code holds at a time, counted in storages."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the storages made inside the context; `peak` is the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                key = x.untyped_storage()._cdata
                if key in known and key not in self._users:
                    continue  # made outside
                self._live[key] = x.untyped_storage().nbytes()
                self._users[key] = self._users.get(key, 0) + 1
                weakref.finalize(x, self._release, key)
        self.peak = max(self.peak, sum(self._live.values()))
        return out

    def _release(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key], self._live[key]

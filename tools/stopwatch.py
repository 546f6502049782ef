"""Where the time of training steps goes: waiting for data, forward and backward, communication, the optimiser."""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# The parts by their names in summary.csv, with the words that the display has for them.
PARTS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "compute_and_communication": "forward, backward and communication",
    "communication": "communication",
    "optimizer": "optimiser",
}


class Stopwatch:
    """Adds up the seconds of each part of a training step.

    On a GPU, CUDA events measure, so that data which arrive while it still computes cost nothing; elsewhere, the clock
    of the process.

    Communication is the time from when the last bucket of gradients is ready to when all are averaged: the part that
    the backward pass does not hide, with the wait for slower processes. Only `DistributedDataParallel` tells that
    moment; with other ways to run several processes, communication is counted with the forward and backward passes.

    Args:
        device: where the model is.
        module: as the steps run it.
        world: number of processes.
    """

    def __init__(self, device: torch.device, module: nn.Module, world: int = 1) -> None:
        self.device = device
        self.reducing = False
        self.marks: list[tuple[str | None, torch.cuda.Event]] = []
        self.compute, parts = "compute", ["data", "compute", "optimizer"]
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, self._reduce)
            parts.insert(2, "communication")
        elif world > 1:
            self.compute = parts[1] = "compute_and_communication"
        self.seconds = dict.fromkeys(parts, 0.0)
        self.start()

    def start(self) -> None:
        """Begin an epoch, with no time counted."""
        self.marks.clear()
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self._mark(None)

    def lap(self, part: str | None) -> None:
        """Count the time since the last lap to `part`, or to none of them."""
        if self.reducing:  # since the last bucket was ready
            part, self.reducing = "communication", False
        self._mark(self.compute if part == "compute" else part)

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part since `start`, the mean over all processes, which must all call this."""
        if self.marks:
            self.marks[-1][1].synchronize()
            self._settle()
        values = torch.tensor(list(self.seconds.values()), dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return dict(zip(self.seconds, values.tolist(), strict=True))

    def _reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._mark("compute")
        self.reducing = True
        return allreduce_hook(state, bucket)

    def _mark(self, part: str | None) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
            self._settle()
            return
        now = time.perf_counter()
        if part:
            self.seconds[part] += now - self.last
        self.last = now

    def _settle(self) -> None:
        """Add up the times between events that the GPU has passed; this waits for none."""
        while len(self.marks) > 1 and self.marks[1][1].query():
            (_, before), (part, event) = self.marks[:2]
            if part:
                self.seconds[part] += before.elapsed_time(event) / 1000
            del self.marks[0]

"""The start, the talk and the end of the processes that torchrun starts for one command."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from visionmix.tools import models


def join(device: str | None, *, names_only: bool = False) -> tuple[torch.device, int, int]:
    """Return (device, rank, world size), joining the other processes where torchrun started several.

    Args:
        device: as `models.choose_device` takes it; None gives each process of a machine a GPU of its own.
        names_only: the processes exchange names alone, so they do it by gloo, and the first to end waits for the others
            as long as these work.

    Raises:
        ValueError: the device is not there.
    """
    world, rank, local = (int(os.environ.get(name, first)) for name, first in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    if world > 1 and device is None and torch.cuda.is_available():
        device = f"cuda:{local}"
    chosen = models.choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store, with the addresses of dead processes in it, when it starts new ones.
            store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if chosen.type == "cuda" and not names_only else "gloo"
        timeout = timedelta(days=30) if names_only else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return chosen, rank, world


def gather(value: Any) -> list:
    """Return the values that all processes give, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def leave() -> None:
    """Leave the other processes, where there are some."""
    if dist.is_initialized():
        dist.destroy_process_group()

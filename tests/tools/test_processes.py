"""Processes of one command find each other, exchange values and part."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from visionmix.tools import processes

RUN = """
import os, signal, sys, time
import torch, torch.distributed as dist
from visionmix.tools import processes
device, rank, world = processes.join("cpu", names_only=sys.argv[1] == "names")
assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (rank, world, "gloo")
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
if rank == 0:
    print(processes.gather({"rank": rank}), flush=True)
else:
    processes.gather({"rank": rank})
processes.leave()
assert not dist.is_initialized()
"""


def test_alone_there_is_nobody_to_talk_to(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.join("cpu") == (torch.device("cpu"), 0, 1)
    assert processes.gather("a") == ["a"]
    processes.leave()
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="--device 'cuda:999' cannot be used"):
        processes.join("cuda:999")


@pytest.mark.long  # processes that import PyTorch
@pytest.mark.parametrize("talk", ["names", "tensors"])
def test_processes_started_again_after_a_death_join_each_other_and_not_the_dead(talk, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(tmp_path / "run.py"), talk],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[{'rank': 0}, {'rank': 1}]\n"

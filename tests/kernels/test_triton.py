"""The Triton kernels without a GPU: interpreted in a process of its own, and how they are launched."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from visionmix.kernels import gpu
from visionmix.tools import compile_kernels, kernel_problems


def interpret(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    cases = Path(__file__).with_name("interpreted_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("VISIONMIX_KERNELS", None)
    result = subprocess.run([*command, str(cases)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_interpreted():
    interpret("not long")


@pytest.mark.long
def test_interpreted_sweep():
    interpret("long")


@pytest.mark.parametrize("repeatable", [True, False])
def test_only_repeatable_launches_are_tuned(monkeypatch, repeatable):
    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: ran.append(arguments)

    ran = []
    monkeypatch.setenv(gpu.TUNE_VARIABLE, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "_tuned", lambda *_: (2, 3))
    monkeypatch.setattr(gpu, "target", lambda: gpu.Target("hip", "gfx942"))
    gpu.launch(Kernel(), (1,), num_warps=8, repeatable=repeatable)
    assert ran == [{"num_warps": 2, "num_stages": 3} if repeatable else {"num_warps": 8, "num_stages": 1}]


@pytest.mark.parametrize(
    ("orders", "programs", "repeatable"),
    [(kernel_problems.CROSS, 1, True), ("window_2,raster", 1, False), ("window_2,raster", 1 << 30, True)],
)
def test_maps_merged_into_zeros_are_not_repeatable(monkeypatch, orders, programs, repeatable):
    module = importlib.import_module("visionmix.kernels.selective_scan_2d.triton")
    found = []
    monkeypatch.setattr(module, "ENOUGH_PROGRAMS", programs)
    monkeypatch.setattr(module, "launch", lambda *_, repeatable, **__: found.append(repeatable))
    with gpu.plan(compile_kernels.DEVICES["sm_90"].target):
        kernel_problems.selective_scan_2d(5, 7, 16, 1, orders=orders)(torch.float32)
    assert found == [repeatable] * 3

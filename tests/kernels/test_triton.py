"""The Triton kernels: interpreted and, where there is a GPU, run on it; how they are launched."""

import importlib
from pathlib import Path

import pytest
import torch
from accelerator import needs_gpu, run_triton_cases

pytest.importorskip("triton")

from visionmix.kernels import gpu
from visionmix.tools import compile_kernels, kernel_problems

CASES = Path(__file__).with_name("triton_cases.py")


def test_interpreted():
    run_triton_cases(CASES, "not long", interpreted=True)


@pytest.mark.long
def test_interpreted_sweep():
    run_triton_cases(CASES, "long", interpreted=True)


@needs_gpu
def test_on_the_gpu():
    run_triton_cases(CASES, "", interpreted=False)


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

"""The Triton kernels without a GPU: interpreted in a process of its own, and compiled ahead of time."""

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

REPRESENTATIVE = {
    "gated_linear_attention": "5x6",
    "selective_scan": "one state",
    "selective_scan_2d": "full delta",
}


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


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("op", REPRESENTATIVE)
def test_compiles_without_spills(op, target, capsys):
    arguments = ["--op", op, "--target", target, "--dtype", "bfloat16", "--problem", REPRESENTATIVE[op]]
    assert compile_kernels.main(arguments) == 0, capsys.readouterr().err


def test_spills_and_shared_memory_are_faults():
    report = compile_kernels.Report("op", "shapes", "float32", "kernel", "", 4, "gfx942", 64, 0, 1 << 10, 1.0)
    assert report.fault() is None
    for field, value in (("spills", 4), ("shared", 65 << 10)):
        faulty = compile_kernels.Report(**{**report.__dict__, field: value})
        assert str(value) in faulty.fault()


def test_occupancy():
    device = compile_kernels.DEVICES["sm_90"]
    # 65,536 registers: 2 programs of 8 warps at 128 registers a thread, of 64 warps.
    assert device.occupancy(128, 0, 8) == 2 * 8 / 64
    assert device.occupancy(32, 100 << 10, 4) == 2 * 4 / 64


@pytest.mark.parametrize("repeatable", [True, False])
def test_only_repeatable_launches_are_tuned(monkeypatch, repeatable):
    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: ran.append(arguments)

    ran = []
    monkeypatch.setenv(gpu.TUNE_VARIABLE, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "_tuned", lambda *_: (2, 3))
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

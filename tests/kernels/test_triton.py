"""The Triton kernels: interpreted and, where there is a GPU, run on it; how they are launched."""

from pathlib import Path

import pytest
from accelerator import needs_gpu, run_triton_cases

pytest.importorskip("triton")

from visionmix.kernels import gpu

FILES = [Path(__file__).with_name(f"triton_{name}cases.py") for name in ("", "neighborhood_attention_")]
EACH_FILE = pytest.mark.parametrize("cases", FILES, ids=lambda path: path.name)


def test_interpreted():
    run_triton_cases(*FILES, marker="not long", interpreted=True)


@pytest.mark.long
@EACH_FILE
def test_interpreted_sweep(cases):
    run_triton_cases(cases, marker="long", interpreted=True)


@needs_gpu
@EACH_FILE
def test_on_the_gpu(cases):
    run_triton_cases(cases, marker="", interpreted=False)


def test_launches_are_tuned_where_asked_for(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: ran.append(arguments)

    ran = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu, "_tuned", lambda *_: (2, 3))
    monkeypatch.setattr(gpu, "target", lambda: gpu.Target("hip", "gfx942"))
    for asked in ("1", "0"):
        monkeypatch.setenv(gpu.TUNE_VARIABLE, asked)
        gpu.launch(Kernel(), (1,), num_warps=8)
    assert ran == [{"num_warps": 2, "num_stages": 3}, {"num_warps": 8, "num_stages": 1}]

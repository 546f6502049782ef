"""Where tests run: the CPU always, a GPU where there is one; the Triton kernels' cases in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))

# Of a process that runs the Triton kernels' cases: the interpreter takes tensors on the CPU.
TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="PyTorch sees no GPU")


def run_triton_cases(*files: Path, marker: str, interpreted: bool) -> None:
    """Run the tests of `files` that have `marker`, in Triton's interpreter or on the GPU, and expect that they pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker]
    environment = {name: value for name, value in os.environ.items() if name != "VISIONMIX_KERNELS"}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    result = subprocess.run([*command, *map(str, files)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout

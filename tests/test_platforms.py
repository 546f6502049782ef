"""What docs/platforms.md says of ops and types on a CPU, and the library without Triton and without a compiler."""

import os
import random
import re
import subprocess
import sys

import doc_pages
import pytest
import random_calls
import timm
import torch
from tiny_models import CORE, EVERY

from visionmix.kernels import backends, dispatch, native

PAGE = doc_pages.ROOT / "docs" / "platforms.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NAMES = {"compiled C++": "cpu", "PyTorch": "reference"}
CALLS = {
    "gated_linear_attention": random_calls.gated_linear_attention,
    "bidirectional_gated_linear_attention": random_calls.bidirectional_gated_linear_attention,
    "selective_scan": random_calls.selective_scan,
    "selective_scan_2d": random_calls.selective_scan_2d,
    "neighborhood_attention": random_calls.neighborhood_attention,
}
BLOCKED = {"CXX": "none", "PYTHONPATH": str(doc_pages.ROOT / "tests" / "support" / "no_triton")}


def table() -> dict[tuple[str, str], str]:
    """Return what the page says of an op and a type on a CPU."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    start = next(number for number, cells in enumerate(lines) if cells[0] == "op, on a CPU")
    heads = lines[start][1:]
    said = {}
    for cells in lines[start + 2 : start + 2 + len(CALLS)]:
        for head, cell in zip(heads, cells[1:], strict=True):
            said |= {(cells[0].strip("`"), dtype): cell for dtype in head.split(", ")}
    return said


def test_the_page_names_every_op_and_type():
    assert {op for op, _ in table()} == CALLS.keys() == backends().keys()
    assert {dtype for _, dtype in table()} == DTYPES.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CALLS)
def test_ops_run_where_the_page_says(op, dtype):
    if backends()[op]["cpu"] != "ready":
        pytest.skip("no compiled kernels here")
    call = CALLS[op](random.Random(3))
    values = call.outputs_and_gradients(lambda x: x.to(DTYPES[dtype]).detach())
    assert all(value.isfinite().all() for value in values.values())
    exact = native.leaves_to_reference(op, torch.zeros(1, dtype=DTYPES[dtype]))
    runs = "reference" if exact else dispatch.resolve(op, "auto", torch.device("cpu"))
    assert NAMES[table()[op, dtype]] == runs


@EVERY
@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_models_run_in_each_type(name, dtype):
    torch.manual_seed(0)
    model = timm.create_model(name).to(DTYPES[dtype]).train()
    logits = model(torch.randn(2, 3, 96, 96).to(DTYPES[dtype]))
    logits.double().square().mean().backward()
    assert logits.dtype == DTYPES[dtype]
    assert logits.isfinite().all()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())


WITHOUT = """
import sys
import pytest, timm, torch, visionmix
timm.create_model("test_vig")(torch.randn(1, 3, 64, 96)).sum().backward()
backends = visionmix.kernels.backends()
assert backends["gated_linear_attention"]["reference"] == "ready"
assert backends["gated_linear_attention"]["triton"] != "ready"
# Models that learn without labels are no classifiers, and none of timm's.
assert timm.is_model("roma_arm_base") and not timm.is_model("roma_pretraining")
print(backends)
sys.exit(pytest.main(sys.argv[1:]))
"""


OF_EVERY_OP = ["test_vig", "test_vmamba", "test_vim_tiny", "test_dinat"]


@pytest.mark.parametrize("models", [OF_EVERY_OP, pytest.param(CORE, marks=pytest.mark.long)], ids=["ops", "core"])
def test_the_library_runs_without_triton_and_without_a_compiler(models):
    """Part of the suite in a process where neither can be had, as the page says how."""
    command = re.search(r"^(CXX=\S+) (PYTHONPATH=\S+) sh tools/test\.sh", PAGE.read_text(), re.MULTILINE)
    assert command is not None
    assert dict(part.replace("$PWD", str(doc_pages.ROOT)).split("=") for part in command.groups()) == BLOCKED
    tests = ["tests/kernels/test_gated_linear_attention.py", "tests/kernels/test_triton.py"]
    tests.append("tests/scans/test_scan_order_op.py")
    tests += [f"tests/backbones/test_contract.py::test_one_pass_and_one_graph_by_fx[{name}]" for name in models]
    run = [sys.executable, "-c", WITHOUT, "-q", "-p", "no:cacheprovider", "-m", "not long", *tests]
    done = subprocess.run(
        run, cwd=doc_pages.ROOT, env=os.environ | BLOCKED, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "CXX='none' is not found" in done.stdout
    assert "triton cannot be imported" in done.stdout

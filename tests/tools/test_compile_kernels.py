"""The Triton kernels compiled ahead of time: no spills, shared memory within the limits, and a tool that says so."""

import pytest

pytest.importorskip("triton")

from visionmix.kernels.gpu import plan
from visionmix.tools import compile_kernels
from visionmix.tools.kernel_problems import PROBLEMS

QUICK = [
    ("gated_linear_attention", "4x4", "sm_90", "bfloat16"),
    ("gated_linear_attention", "4x4", "gfx942", "float16"),
    ("selective_scan", "one state", "sm_100", "bfloat16"),
    ("selective_scan", "one state", "gfx942", "float32"),
    ("selective_scan_2d", "windows, not merged", "sm_90", "bfloat16"),
    ("selective_scan_2d", "full delta", "gfx942", "float16"),
    ("neighborhood_attention", "heads of 128", "sm_100", "bfloat16"),
    ("neighborhood_attention", "heads of 64", "gfx942", "float32"),
    ("neighborhood_attention", "nat_mini stage 4", "sm_80", "float16"),
]
LIMIT = compile_kernels.DEVICES["gfx942"].shared_program


@pytest.mark.parametrize(("op", "problem", "target", "dtype"), QUICK)
def test_compiles_without_spills(op, problem, target, dtype, capsys):
    arguments = ["--op", op, "--target", target, "--dtype", dtype, "--problem", problem]
    assert compile_kernels.main(arguments) == 0, capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("dtype", compile_kernels.DTYPES)
@pytest.mark.parametrize("target", compile_kernels.DEVICES)
@pytest.mark.parametrize("op", PROBLEMS)
def test_every_default_configuration_compiles_without_spills(op, target, dtype, capsys):
    assert compile_kernels.main(["--op", op, "--target", target, "--dtype", dtype]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("usage", "status", "message"),
    [
        ((64, 0, LIMIT), 0, ""),
        ((64, 8, 0), 1, "8 spilled"),
        ((64, 0, LIMIT + 1), 1, f"{LIMIT + 1} bytes of shared memory, of {LIMIT}"),
    ],
)
def test_exit_status_and_files(monkeypatch, capsys, tmp_path, usage, status, message):
    monkeypatch.setattr(compile_kernels, "compile_launch", lambda launch, target: usage)
    file = tmp_path / "table.md"
    arguments = ["--op", "selective_scan", "--target", "gfx942", "--dtype", "float32", "--markdown", str(file)]
    assert compile_kernels.main(arguments) == status
    assert message in capsys.readouterr().err
    rows = file.read_text().splitlines()
    assert rows[0] == "| op | kernel | dtype | gfx942 |"
    assert [row.split(" | ")[1:3] for row in rows[2:]] == [["backward", "float32"], ["forward", "float32"]]
    assert all(f": {', '.join(map(str, usage))} |" in row for row in rows[2:])


def test_table_gives_least_and_most():
    def report(target, registers, shared):
        return compile_kernels.Report("op", "shapes", "float32", "a_kernel", "", 4, target, registers, 0, shared, 1.0)

    rows = compile_kernels.table([report("sm_80", 128, 9), report("sm_80", 64, 9), report("gfx942", 32, 8)])
    assert rows[2] == "| op | a | float32 | 2: 64-128, 0, 9 | 1: 32, 0, 8 |"


def test_only_nvidia_takes_a_limit_of_registers():
    problem = PROBLEMS["selective_scan"][0]
    for target, limit in (("sm_100", 255), ("gfx942", None)):
        with plan(compile_kernels.DEVICES[target].target) as launches:
            problem.run(compile_kernels.DTYPES["bfloat16"])
        assert {launch.options.get("maxnreg") for launch in launches} == {limit}


def test_occupancy():
    device = compile_kernels.DEVICES["sm_90"]
    # 65,536 registers: 2 programs of 8 warps at 128 registers per thread, of 64 warps.
    assert device.occupancy(128, 0, 8) == 2 * 8 / 64
    assert device.occupancy(32, 100 << 10, 4) == 2 * 4 / 64

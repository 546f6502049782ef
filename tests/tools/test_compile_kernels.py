"""The Triton kernels compiled ahead of time: no spills, shared memory within the limits, no more instructions."""

from dataclasses import replace
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

from visionmix.kernels.gpu import plan
from visionmix.tools import compile_kernels, kernel_counts
from visionmix.tools.kernel_problems import PROBLEMS

QUICK = [
    ("gated_linear_attention", "4x4", "sm_90", "bfloat16"),
    pytest.param("selective_scan", "one state", "gfx942", "float32", marks=pytest.mark.long),
    pytest.param("selective_scan_2d", "windows, not merged", "sm_90", "bfloat16", marks=pytest.mark.long),
    pytest.param("neighborhood_attention", "heads of 64", "gfx942", "float32", marks=pytest.mark.long),
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


COUNTED = kernel_counts.filed()
same_triton = pytest.mark.skipif(
    COUNTED[0].triton != version("triton"),
    reason=f"{kernel_counts.FILE.name} is of Triton {COUNTED[0].triton}; --write-counts writes it anew",
)


@same_triton
def test_instructions_of_one_kernel_have_not_grown():
    kernel = "states_kernel"
    found = list(kernel_counts.count(["gated_linear_attention"], ["sm_90"], {kernel}))
    assert {row.part for row in found} == {"whole", "loop"}
    assert kernel_counts.faults(found, COUNTED) == []
    assert kernel_counts.gone(found, [row for row in COUNTED if row.kernel.startswith(kernel)]) == []


@pytest.mark.long
@same_triton
@pytest.mark.parametrize("target", kernel_counts.TARGETS)
@pytest.mark.parametrize("op", PROBLEMS)
def test_instructions_have_not_grown(op, target, capsys):
    assert compile_kernels.main(["--count", "--op", op, "--target", target]) == 0, capsys.readouterr().out


def test_every_kernel_is_counted_on_each_target():
    counted = {(row.op, row.problem, row.target) for row in COUNTED}
    problems = {(op, problem.name) for op, problems in kernel_counts.BENCHMARKS.items() for problem in problems}
    assert counted == {(*problem, target) for problem in problems for target in kernel_counts.TARGETS}
    assert len({row.triton for row in COUNTED}) == 1


COUNT = kernel_counts.Count("op", "shapes", "sm_90", "a_kernel", "loop", 100, 10, 0, 2, 1, "3.8.0")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"instructions": 110, "shuffles": 0}, []),
        ({"instructions": 111}, ["a_kernel, loop (shapes, sm_90): 111 instructions, 100 before"]),
        ({"mufu": 1}, ["a_kernel, loop (shapes, sm_90): 1 mufu, 0 before"]),
        ({"conversions": 2}, ["a_kernel, loop (shapes, sm_90): 2 conversions, 1 before"]),
        ({"kernel": "b"}, ["b, loop (shapes, sm_90) has no row in the file; add it by --write-counts"]),
        ({"target": "sm_100"}, []),  # of which the file has nothing
    ],
)
def test_a_count_may_grow_by_a_tenth(change, told):
    assert kernel_counts.faults([replace(COUNT, **change)], [COUNT]) == told


def test_a_kernel_of_the_file_must_be_found():
    other = replace(COUNT, kernel="b_kernel")
    known = [COUNT, other, replace(COUNT, problem="of another"), replace(COUNT, target="sm_80")]
    assert kernel_counts.gone([COUNT], known) == [
        "b_kernel, loop (shapes, sm_90) is in the file and not compiled; take it out by --write-counts"
    ]


def test_counts_are_written_op_by_op(tmp_path):
    file = tmp_path / "counts.csv"
    here = replace(COUNT, triton=version("triton"))
    both = [here, replace(here, op="other")]
    kernel_counts.write(both, ["op", "other"], ["sm_90"], file)
    assert kernel_counts.filed(file) == both
    kernel_counts.write([replace(here, instructions=90)], ["op"], ["sm_90"], file)
    assert kernel_counts.filed(file) == [replace(here, instructions=90), both[1]]
    kernel_counts.write([replace(row, triton="1.0") for row in both], ["op", "other"], ["sm_90"], file)
    with pytest.raises(ValueError, match=r"has counts of Triton 1\.0, .*; count all ops"):
        kernel_counts.write([here], ["op"], ["sm_90"], file)


def test_instructions_are_not_counted_on_amd(capsys):
    with pytest.raises(SystemExit):
        compile_kernels.main(["--count", "--target", "gfx942"])
    assert "counted for NVIDIA alone" in capsys.readouterr().err


ASSEMBLY = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;
.L_x_0:
        /*0020*/                   LDG.E R2, [R2.64] ;
        /*0030*/              @!P0 MUFU.EX2 R2, R2 ;
        /*0040*/                   BAR.SYNC 0x0 ;
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   SHFL.BFLY PT, R2, R3, 0x2, 0x1f ;
        /*0070*/              @UP2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""

TTGIR = """
tt.func public @kernel() {
  %0 = ttg.convert_layout %a : tensor<1xf32, #blocked> -> tensor<1xf32, #blocked1>
  %1 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %0) -> (f32) : i32 {
    %2 = scf.for %j = %c0 to %n step %c1 iter_args(%y = %x) -> (f32) : i32 {
      %3 = ttg.convert_layout %y : tensor<1xf32, #blocked> -> tensor<1xf32, #blocked1>
      scf.if %p {
        %4 = ttg.convert_layout %y : tensor<1xf32, #blocked> -> tensor<1xf32, #blocked1>
      }
      scf.yield %3 : f32
    }
    %5 = ttg.convert_layout %2 : tensor<1xf32, #blocked> -> tensor<1xf32, #blocked1>
    scf.yield %5 : f32
  }
  tt.return
}
"""


def test_the_innermost_loop_is_found():
    whole, loop = kernel_counts.operations_of(ASSEMBLY)
    assert loop == ["LDG.E", "MUFU.EX2", "BAR.SYNC", "BRA"]
    assert len(whole) == 10
    assert kernel_counts.count_conversions(TTGIR) == (4, 2)
    straight = ASSEMBLY.replace("`(.L_x_0)", "`(.L_x_2)").replace("`(.L_x_1)", "`(.L_x_2)")
    assert kernel_counts.operations_of(straight)[1] == []

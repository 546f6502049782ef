"""Compile the Triton kernels ahead of time, without a GPU, and report the resources they use on each target.

    python tools/compile_kernels.py
    python tools/compile_kernels.py --op gated_linear_attention --target sm_90 gfx942 --csv kernels.csv
    python tools/compile_kernels.py --markdown table.md

Every kernel launch that the ops make in forward and backward on a set of shapes, in each dtype, is planned on meta
tensors and compiled with the arguments, tiles and warps that it would run with. Exits with status 1 if a kernel spills
registers or wants more shared memory than a program of the target has.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmix.kernels.gpu import Launch, Target, plan
from visionmix.tools.arguments import check_out
from visionmix.tools.kernel_problems import PROBLEMS, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Device:
    """The limits of a program on a target, and of the programs that run at once on one of its processors (SM or CU).

    Attributes:
        target: what Triton compiles for.
        warp: threads per warp.
        shared_program: bytes of shared memory that one program may use.
        shared_processor: bytes of shared memory of a processor.
        registers_thread: 32-bit registers that a thread may use.
        registers_processor: 32-bit registers of a processor.
        granule: registers per thread are given out in multiples of this.
        warps_processor: warps that a processor holds at most.
        programs_processor: programs that a processor holds at most.
    """

    target: Target
    warp: int
    shared_program: int
    shared_processor: int
    registers_thread: int
    registers_processor: int
    granule: int
    warps_processor: int
    programs_processor: int

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Return the part of the processor's warps that programs of these needs can occupy."""
        registers = max(self.granule, -(-registers // self.granule) * self.granule)
        programs = min(
            self.programs_processor,
            self.warps_processor // warps,
            self.registers_processor // (registers * self.warp * warps),
            self.shared_processor // max(1, shared),
        )
        return programs * warps / self.warps_processor


# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability (1 KiB of the processor's shared
# memory is the system's, for each program). AMD: CDNA3 ISA guide (4 SIMDs of 512 vector registers, 8 waves each).
DEVICES = {
    "sm_80": Device(Target("cuda", 80), 32, 163 << 10, 163 << 10, 255, 1 << 16, 8, 64, 32),
    "sm_89": Device(Target("cuda", 89), 32, 99 << 10, 99 << 10, 255, 1 << 16, 8, 48, 24),
    "sm_90": Device(Target("cuda", 90), 32, 227 << 10, 227 << 10, 255, 1 << 16, 8, 64, 32),
    "sm_100": Device(Target("cuda", 100), 32, 227 << 10, 227 << 10, 255, 1 << 16, 8, 64, 32),
    "sm_120": Device(Target("cuda", 120), 32, 99 << 10, 99 << 10, 255, 1 << 16, 8, 48, 24),
    "gfx942": Device(Target("hip", "gfx942"), 64, 64 << 10, 64 << 10, 512, 4 * 512 * 64, 8, 32, 32),
}


@dataclass(frozen=True)
class Report:
    """The resources that one kernel variant uses on one target.

    `spills` counts bytes of spill loads and stores on NVIDIA, spilled vector registers on AMD; `shared` is
    in bytes.
    """

    op: str
    problem: str
    dtype: str
    kernel: str
    tiles: str
    warps: int
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float

    def fault(self) -> str | None:
        """Return a description of its problem, or None."""
        if self.spills:
            return f"{self.spills} spilled"
        limit = DEVICES[self.target].shared_program
        return f"{self.shared} bytes of shared memory, of {limit}" if self.shared > limit else None


def _type(value: Any) -> str:
    """Return the type that Triton's launcher gives an argument that is not constant."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source(launch: Launch) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], list]]:
    """Return a launch's signature, constants and attributes, as Triton's launcher would specialise them.

    Constants and attributes are named by the argument's number, and the number in it where it is a tuple.
    """
    constants, attributes = {}, {}

    def specialised(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            types = [specialised(x, (*path, number), parameter) for number, x in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        exact = not parameter.do_not_specialize and isinstance(value, int) and value == 1
        if parameter.is_constexpr or value is None or exact:
            constants[path] = value
            return "constexpr"
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return _type(value)

    signature = {
        parameter.name: specialised(launch.arguments[parameter.name], (place,), parameter)
        for place, parameter in enumerate(launch.kernel.params)
    }
    return signature, constants, attributes


def _key(launch: Launch) -> str:
    return repr((launch.kernel.fn.__qualname__, *source(launch), launch.options))


def launches(problem: Problem, dtype: torch.dtype, target: Target) -> list[Launch]:
    """Return the launches of a problem's forward and backward, each variant once."""
    with plan(target) as planned:
        problem.run(dtype)
    return list({_key(launch): launch for launch in planned}.values())


def _nvidia_usage(log: str) -> tuple[int, int]:
    """Return registers per thread and bytes spilled, as the assembler reports them."""
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return int(re.search(r"Used (\d+) registers", log)[1]), spills


def _amd_usage(asm: dict[str, Any]) -> tuple[int, int]:
    """Return vector registers per thread (accumulation registers included) and those spilled, from the metadata.

    Scalar registers that do not fit are kept in lanes of vector registers, not in memory: they are not spilled.
    """
    text = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return field("vgpr_count"), field("vgpr_spill_count")


def compiled_kernel(launch: Launch, target: str) -> tuple[Any, str]:
    """Compile a launch for a target; return Triton's compiled kernel and what the assembler printed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = DEVICES[target]
    signature, constants, attributes = source(launch)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(log):
        # A kernel from Triton's cache would come without the assembler's report, which Triton prints.
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget(device.target.backend, device.target.arch, device.warp),
            options=launch.options,
        )
    return compiled, log.getvalue()


def compile_launch(launch: Launch, target: str) -> tuple[int, int, int]:
    """Compile a launch for a target; return registers per thread, spills and bytes of shared memory."""
    compiled, log = compiled_kernel(launch, target)
    usage = _nvidia_usage(log) if DEVICES[target].target.backend == "cuda" else _amd_usage(compiled.asm)
    return *usage, compiled.metadata.shared


def _tiles(launch: Launch) -> str:
    """Return the constants that tell variants of a kernel apart, as text."""
    shown = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            shown |= value._asdict() if hasattr(value, "_fields") else {parameter.name: value}
        elif value is None:
            shown[f"no {parameter.name.removeprefix('p_')}"] = True
    return " ".join(
        name if value is True else f"{name}={value}" for name, value in shown.items() if value not in (False, None)
    )


def reports(
    ops: list[str], targets: list[str], dtypes: list[str], problem_names: list[str] | None = None
) -> Iterator[Report]:
    """Yield a report for every variant of the ops' kernels, dtype and target."""
    for op in ops:
        for target in targets:
            seen: set[str] = set()
            for problem in PROBLEMS[op]:
                if problem_names is not None and problem.name not in problem_names:
                    continue
                for dtype in dtypes:
                    for launch in launches(problem, DTYPES[dtype], DEVICES[target].target):
                        if (key := _key(launch)) in seen:
                            continue
                        seen.add(key)
                        registers, spills, shared = compile_launch(launch, target)
                        yield Report(
                            op,
                            problem.name,
                            dtype,
                            launch.kernel.fn.__qualname__,
                            _tiles(launch),
                            launch.options["num_warps"],
                            target,
                            registers,
                            spills,
                            shared,
                            round(DEVICES[target].occupancy(registers, shared, launch.options["num_warps"]), 2),
                        )


def _cell(variants: list[Report]) -> str:
    spans = []
    for field in ("registers", "spills", "shared"):
        values = {getattr(report, field) for report in variants}
        spans.append("-".join(map(str, sorted({min(values), max(values)}))))
    return f"{len(variants)}: {', '.join(spans)}"


def table(found: list[Report]) -> list[str]:
    """Return the lines of a Markdown table, a row for each kernel and dtype.

    A cell holds the variants compiled for a target, their registers per thread, spills and bytes of shared memory.
    """
    targets = [target for target in DEVICES if any(report.target == target for report in found)]
    lines = [f"| op | kernel | dtype | {' | '.join(targets)} |", "| --- | --- | --- |" + " --- |" * len(targets)]
    rows: dict[tuple[str, str, str], dict[str, list[Report]]] = {}
    for report in found:
        row = rows.setdefault((report.op, report.kernel.removesuffix("_kernel"), report.dtype), {})
        row.setdefault(report.target, []).append(report)
    for (op, kernel, dtype), row in sorted(rows.items()):
        cells = (_cell(row[target]) if target in row else "not compiled" for target in targets)
        lines.append(f"| {op} | {kernel} | {dtype} | {' | '.join(cells)} |")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="visionmix compile-kernels", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--op", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="ops to compile; all")
    parser.add_argument("--target", nargs="+", choices=DEVICES, help="targets; all, or with --count sm_80 and sm_90")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the inputs; all")
    parser.add_argument("--problem", nargs="+", help="names of the shapes to compile for; all")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--csv", type=Path, help="write the reports to this file")
    parser.add_argument("--markdown", type=Path, help="write a table of the kernels to this file")
    parser.add_argument(
        "--count", action="store_true", help="count the instructions of the benchmark problems' loops in bfloat16"
    )
    parser.add_argument(
        "--write-counts", action="store_true", help="count, and write benchmarks/kernel_counts.csv anew"
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError at a problem that no op has, and at a file that cannot be written."""
    names = [problem.name for op in arguments.op for problem in PROBLEMS[op]]
    for name in arguments.problem or ():
        if name not in names:
            raise ValueError(f"--problem {name!r} is none of {', '.join(arguments.op)}; give one of {names}")
    for option in ("json", "csv", "markdown"):
        if path := getattr(arguments, option):
            check_out(path, name=f"--{option}")


def main(argv: list[str] | None = None) -> int:
    """Compile what the arguments ask for; return 1 if a kernel spills or exceeds its shared memory."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        _check(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.count or arguments.write_counts:
        from visionmix.tools import kernel_counts  # which imports this module

        targets = arguments.target or kernel_counts.TARGETS
        try:
            return kernel_counts.report(arguments.op, targets, rewrite=arguments.write_counts)
        except ValueError as error:
            parser.error(str(error))
    found = []
    print(
        f"{'kernel':<26}{'dtype':<10}{'target':<8}{'warps':>5}{'regs':>6}{'spills':>8}{'shared':>8}{'occ.':>6}  tiles"
    )
    for report in reports(arguments.op, arguments.target or list(DEVICES), arguments.dtype, arguments.problem):
        found.append(report)
        print(
            f"{report.kernel:<26}{report.dtype:<10}{report.target:<8}{report.warps:>5}{report.registers:>6}"
            f"{report.spills:>8}{report.shared:>8}{report.occupancy:>6.0%}  {report.problem}: {report.tiles}",
            flush=True,
        )
    rows = [asdict(report) for report in found]
    for path in filter(None, (arguments.json, arguments.csv, arguments.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, Report.__dataclass_fields__)
            writer.writeheader()
            writer.writerows(rows)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(table(found)) + "\n")
    faults = [(report, fault) for report in found if (fault := report.fault())]
    for report, fault in faults:
        print(f"{report.kernel} ({report.dtype}, {report.target}, {report.problem}): {fault}", file=sys.stderr)
    print(f"{len(found)} compiled, {len(faults)} at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

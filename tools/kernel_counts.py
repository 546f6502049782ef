"""Machine instructions of the kernels, whole and of their main loops, counted in what is compiled, without a GPU.

A loop's count is of one warp and one iteration of the longest innermost loop. Counts depend on Triton's version, which
`benchmarks/kernel_counts.csv` names: it holds those of the benchmark problems, and a kernel whose count has grown by
more than a tenth is at fault.
"""

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

from visionmix.tools.compile_kernels import DEVICES, compiled_kernel, launches
from visionmix.tools.kernel_problems import BENCHMARKS

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "kernel_counts.csv"
TARGETS = ("sm_80", "sm_90")
DTYPE = torch.bfloat16
_GROWTH = 0.1  # of a count at most
_COUNTED = {"shuffles": "SHFL", "mufu": "MUFU", "barriers": "BAR"}


@dataclass(frozen=True)
class Count:
    """Counts of a kernel on one target.

    Attributes:
        kernel: its name, with a number where a problem launches several variants, in the order of the launches.
        part: "loop", or "whole" for all that is compiled.
        instructions: of a warp, an iteration.
        shuffles: of them, between lanes.
        mufu: of them, exponentials, logarithms and reciprocals.
        barriers: of them, for all warps of a program.
        conversions: between layouts, in Triton's own terms; each is shuffles or a way through shared memory.
        triton: the version of Triton.
    """

    op: str
    problem: str
    target: str
    kernel: str
    part: str
    instructions: int
    shuffles: int
    mufu: int
    barriers: int
    conversions: int
    triton: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it apart from the others."""
        return self.op, self.problem, self.target, self.kernel, self.part

    @property
    def name(self) -> str:
        """The same in words."""
        return f"{self.kernel}, {self.part} ({self.problem}, {self.target})"


_NUMBERS = tuple(field.name for field in fields(Count) if field.type is int)


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(file)], capture_output=True, text=True, check=True
        ).stdout


def _longest(items: list[str], loops: list[tuple[int, int]]) -> list[str]:
    """Return the items of the longest of the innermost loops (first, behind the last); none without loops."""
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    first, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return items[first:end]


def operations_of(assembly: str) -> tuple[list[str], list[str]]:
    """Return the operations in nvdisasm's text, and those of the longest innermost loop.

    A loop lies between a label and a branch back to it. A branch to itself is the kernel's end.
    """
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*\.(L_\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            branch = re.search(r"`\(\.(L_\w+)\)", found[2]) if found[1].startswith("BRA") else None
            first = labels.get(branch[1]) if branch else None
            if first is not None and first < len(operations):
                loops.append((first, len(operations) + 1))
            if found[1] != "NOP":  # what fills the end up
                operations.append(found[1])
    return operations, _longest(operations, loops)


def count_conversions(ttgir: str) -> tuple[int, int]:
    """Return how many layouts are converted in a kernel in Triton's GPU dialect, and in its longest innermost loop."""
    lines = ttgir.splitlines()
    loops, opened, depth = [], [], 0
    for number, line in enumerate(lines):
        depth += line.count("{") - line.count("}")
        if re.search(r"\bscf\.(for|while)\b", line):
            opened.append((number, depth))
        elif opened and depth < opened[-1][1]:
            loops.append((opened.pop()[0], number))
    whole, loop = (sum("ttg.convert_layout" in line for line in part) for part in (lines, _longest(lines, loops)))
    return whole, loop


def count(ops: Iterable[str], targets: Iterable[str], kernels: set[str] | None = None) -> Iterator[Count]:
    """Yield the counts of the benchmark problems' kernels; of those named in `kernels` alone, where given."""
    for op in ops:
        for problem in BENCHMARKS[op]:
            for target in targets:
                seen: Counter[str] = Counter()
                for launch in launches(problem, DTYPE, DEVICES[target].target):
                    name = launch.kernel.fn.__name__
                    seen[name] += 1
                    if kernels is not None and name not in kernels:
                        continue
                    asm = compiled_kernel(launch, target)[0].asm
                    numbered = name if seen[name] == 1 else f"{name} {seen[name]}"
                    counted = (operations_of(_disassembled(asm["cubin"])), count_conversions(asm["ttgir"]))
                    for part, operations, conversions in zip(("whole", "loop"), *counted, strict=True):
                        found = Counter(operation.split(".")[0] for operation in operations)
                        if found:
                            numbers = {field: found[operation] for field, operation in _COUNTED.items()}
                            numbers |= {"instructions": found.total(), "conversions": conversions}
                            yield Count(op, problem.name, target, numbered, part, **numbers, triton=version("triton"))


def filed(path: Path = FILE) -> list[Count]:
    """Return the counts of a file that `write` wrote."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Count(**row | {name: int(row[name]) for name in _NUMBERS}) for row in rows]


def write(found: list[Count], ops: Iterable[str], targets: Iterable[str], path: Path = FILE) -> None:
    """Replace the rows of `ops` on `targets` in the file.

    Raises:
        ValueError: the other rows are of another Triton.
    """
    asked = set(product(ops, targets))
    others = [row for row in (filed(path) if path.exists() else []) if (row.op, row.target) not in asked]
    if former := {row.triton for row in others} - {version("triton")}:
        told = f"{path} has counts of Triton {former.pop()}, and this is {version('triton')}"
        raise ValueError(f"{told}; count all ops on {' and '.join(TARGETS)}")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Count)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, sorted([*others, *found], key=lambda row: row.key)))


def faults(found: list[Count], known: list[Count]) -> list[str]:
    """Return what has grown by more than a tenth, and the kernels that are not known on a known target, in words."""
    before = {row.key: row for row in known}
    targets = {row.target for row in known}
    told = []
    for row in found:
        if row.target not in targets:
            continue
        if row.key not in before:
            told.append(f"{row.name} has no row in the file; add it by --write-counts")
            continue
        for field in _NUMBERS:
            now, then = getattr(row, field), getattr(before[row.key], field)
            if now > then * (1 + _GROWTH):
                told.append(f"{row.name}: {now} {field}, {then} before")
    return told


def gone(found: list[Count], known: list[Count]) -> list[str]:
    """Return the known kernels of the same problems and targets that are not found, in words."""
    asked = {row.key[:3] for row in found}  # op, problem and target
    names = {row.key for row in found}
    missing = [row for row in known if row.key[:3] in asked and row.key not in names]
    return [f"{row.name} is in the file and not compiled; take it out by --write-counts" for row in missing]


def report(ops: list[str], targets: list[str], *, rewrite: bool) -> int:
    """Print the counts beside those of the file, or with `rewrite` put them there; return 1 if one has grown.

    Raises:
        ValueError: a target is not NVIDIA's, or as `write`.
    """
    for target in targets:
        if DEVICES[target].target.backend != "cuda":
            raise ValueError(f"--target {target}: instructions are counted for NVIDIA alone, such as {TARGETS[-1]}")
    known = filed() if FILE.exists() else []
    before = {row.key: row for row in known}
    found = []
    names = _NUMBERS[1:]
    print(
        f"{'kernel':<32}{'part':<6}{'target':<8}{'instr.':>8}{'before':>8}{''.join(f'{n:>12}' for n in names)} problem"
    )
    for row in count(ops, targets):
        found.append(row)
        then = str(before[row.key].instructions) if row.key in before else "-"
        numbers = "".join(f"{getattr(row, name):>12}" for name in names) + f" {row.op} {row.problem}"
        print(f"{row.kernel:<32}{row.part:<6}{row.target:<8}{row.instructions:>8}{then:>8}{numbers}", flush=True)
    if rewrite:
        write(found, ops, targets)
        return 0
    if not known or known[0].triton != version("triton"):
        former = f"is of Triton {known[0].triton}, and this is {version('triton')}" if known else "is not here"
        print(f"{FILE} {former}: nothing is compared")
        return 0
    told = faults(found, known) + gone(found, known)
    print("\n".join(told) or f"{len(found)} counts, none has grown by over a tenth")
    return 1 if told else 0

"""The run that looks at everything on a GPU: here in Triton's interpreter, and with workers that fail."""

import csv
import importlib
import sys
import time
import types

import pytest
import timm
import torch

pytest.importorskip("triton")

from visionmix import kernels
from visionmix.tools import gpu, gpu_parts, gpu_peers, kernel_checks, kernel_problems, workers
from visionmix.tools.gpu_page import CONDITIONS, Report
from visionmix.tools.kernel_problems import Tensors
from visionmix.tools.workers import Task, Worker, run_all


def rows(folder):
    with (folder / "gpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_gpu_tiny_problems_are_checked_and_nothing_is_timed(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path), "--device", "cpu", "--op", "gated_linear_attention"]) == 0
    found = rows(tmp_path)
    assert {row["part"] for row in found} == {"correctness", "ops", "models"}
    checked = [row for row in found if row["part"] == "correctness"]
    assert {row["dtype"] for row in checked} == set(gpu_parts.DTYPES)
    assert {row["what"] for row in checked} == {"out", *(f"gradient of {name}" for name in "qkvg")}
    assert all(row["passed"] == "True" and 0 < float(row["value"]) <= float(row["limit"]) for row in checked)
    others = [row for row in found if row["part"] != "correctness"]
    assert {row["by"] for row in others} >= {"visionmix", "kernel", "eager"}
    assert not any(row["value"] or row["passed"] == "False" for row in others)
    assert all(row[name] for row in found for name in CONDITIONS)
    page = (tmp_path / "gpu.md").read_text()
    assert f"{len(checked)} of {len(checked)} results lie within their tolerances" in page
    assert "nothing was timed" in page
    assert "--op gated_linear_attention" in page
    assert "mix_kernel" in page
    assert "gradient of q" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--minutes", "0"], "give some minutes"),
        (["--minutes", "nan"], "give some minutes"),
        (["--op", "attention"], "invalid choice"),
        (["--peer", "mamba_ssm"], "write it as mamba_ssm=FOLDER"),
        (["--peer", "mamba_ssm=/nowhere"], "has no csrc/selective_scan; give a clone of state-spaces/mamba"),
        (["--peer", "xformers=."], "there is no peer 'xformers' from a folder"),
        (["--device", "cpu", "--sweep"], "nothing is timed without a GPU; leave it out"),
        (["--device", "cpu", "--part", "sweep"], "nothing is timed without a GPU; leave it out"),
    ],
)
def test_bad_arguments_are_refused(arguments, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out"), "--device", "cuda"])
    assert "PyTorch sees no GPU; leave it out" in capsys.readouterr().err


def test_a_folder_with_another_file_is_refused(tmp_path, capsys):
    (tmp_path / "gpu.csv").write_text("op,ms\n")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "move it aside" in capsys.readouterr().err
    assert (tmp_path / "gpu.csv").read_text() == "op,ms\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "gpu.csv"), "--device", "cpu"])
    assert "is a file; give a folder" in capsys.readouterr().err


STUB = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("workers", {workers.__file__!r})
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)

def run(part, item):
    print("noise")
    yield {{"value": item["number"], "pid": os.getpid()}}
    if part == "hangs":
        time.sleep(60)
    if part == "crashes":
        os._exit(3)
    if part in ("fails", "spoils"):
        raise RuntimeError(part)

workers.serve(run, lambda: os.path.exists("spoilt"))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Return a maker of workers that hang, crash or fail as they are told."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    made = []

    def make():
        made.append(Worker("stub", tmp_path / "log.txt", {"PYTHONPATH": str(tmp_path)}))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def done(tasks, workers, seconds=30.0):
    told, left = [], None
    begun = time.monotonic()
    left = run_all(tasks, workers, begun + seconds, lambda task, row, error: told.append((task.part, row, error)))
    return told, left, time.monotonic() - begun


def test_a_task_that_fails_costs_itself_alone(stub, tmp_path):
    parts = ["works", "fails", "works", "crashes", "works", "hangs", "works"]
    tasks = [Task(part, {"number": number}, 2.0) for number, part in enumerate(parts)]
    told, left, took = done(tasks, [stub()])
    assert left == []
    assert took < 20
    values = [row["value"] for _, row, _ in told if row]
    assert values == list(range(len(parts)))  # what was found before the failure is kept
    ends = {part: error for part, row, error in told if row is None}
    assert ends["works"] == ""
    assert ends["fails"] == "RuntimeError: fails"
    assert "ended with status 3" in ends["crashes"]
    assert "stopped after 2 s" in ends["hangs"]
    pids = [row["pid"] for _, row, _ in told if row]
    assert len(set(pids[:4])) == 1  # an error alone starts no new process
    assert len(set(pids)) == 3
    assert "noise" in (tmp_path / "log.txt").read_text()


def test_a_process_whose_gpu_is_lost_is_replaced(stub, tmp_path):
    (tmp_path / "spoilt").touch()
    told, *_ = done([Task("spoils", {"number": number}, 5.0) for number in range(2)], [stub()])
    assert len({row["pid"] for _, row, _ in told if row}) == 2


def test_what_is_not_begun_by_the_deadline_is_left(stub):
    tasks = [Task("hangs", {"number": number}, 60.0) for number in range(4)]
    told, left, took = done(tasks, [stub(), stub()], 3.0)
    assert left == tasks[2:]
    assert took < 10
    assert [error for _, row, error in told if row is None] == ["stopped after 3 s"] * 2


@pytest.fixture
def scripted(monkeypatch):
    """Return the tasks that a run on a GPU gives its workers, in order, and the errors that they answer with."""
    tasks, errors = [], {}

    class Scripted:
        def __init__(self, module, log, environment):
            assert environment["TRITON_INTERPRET"] == "0"

        def run(self, task, keep):
            tasks.append(task)
            if task.part == "conditions":
                keep(dict.fromkeys(CONDITIONS, "known"))
            if task.part == "machine":
                keep({"subject": "memory", "value": 80.0, "unit": "GiB"})
                keep({"subject": "copying", "value": 3.0, "unit": "TB/s"})
                keep({"subject": "matrix products", "value": 700.0, "unit": "TFLOP/s"})
            told = errors.get((task.part, task.item.get("op"), task.item.get("dtype")), [])
            return told.pop(0) if told else ""

        def stop(self):
            pass

    monkeypatch.setattr(gpu, "Worker", Scripted)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    return tasks, errors


def items(tasks, part, *keys):
    return [tuple(task.item[key] for key in keys) for task in tasks if task.part == part]


def test_on_a_gpu_everything_is_looked_at_in_order(scripted, tmp_path):
    tasks, _ = scripted
    ops = list(kernel_problems.PROBLEMS)
    run = gpu.Run(tmp_path, "cuda", 1.0, ops, {"mamba_ssm": tmp_path}, "command")
    run.run(["machine", "correctness", "ops", "models", "sweep"])
    parts = [task.part for task in tasks if task.part != "build"]
    assert list(dict.fromkeys(parts)) == ["conditions", "machine", "correctness", "ops", "models", "sweep"]
    assert all(0 < task.seconds <= 60 for task in tasks)

    checked = items(tasks, "correctness", "op", "problem", "dtype")
    problems = {(op, each.name) for op, every in gpu_parts.CHECKED.items() for each in every}
    assert sorted(checked) == sorted((*problem, dtype) for problem in problems for dtype in gpu_parts.DTYPES)

    # The op whose peer is compiled meanwhile comes last.
    assert items(tasks, "build", "peer") == [("mamba_ssm",)]
    assert items(tasks, "ops", "op")[-1] == ("selective_scan",)
    assert {op for (op,) in items(tasks, "ops", "op")} == set(ops)
    assert set(items(tasks, "ops", "copied", "multiplied")) == {(3e12, 700e12)}

    models = items(tasks, "models", "model", "img_size", "batch", "train", "compiled", "profile")
    for name in (*gpu_parts.MODELS, *gpu_parts.TIMM_MODELS):
        for compiled in (False, True):
            assert (name, 224, 128, False, compiled, False) in models
            assert (name, 224, 64, True, compiled, False) in models
    assert {name for name, *_, profiled in models if profiled} == set(gpu_parts.MODELS)
    assert ("vig_t", 1024, 16, False, False, False) in models
    assert all(timm.is_model(name) for name, *_ in models)
    assert {op for (op,) in items(tasks, "sweep", "op")} == set(ops)


def test_a_check_whose_memory_ran_out_is_made_again_alone(scripted, tmp_path):
    tasks, errors = scripted
    errors["correctness", "selective_scan", "float32"] = ["OutOfMemoryError: of 80 GiB"]
    errors["correctness", "selective_scan", "float16"] = ["OutOfMemoryError: of 80 GiB"] * 99
    errors["ops", "selective_scan", "bfloat16"] = ["RuntimeError: wrong"]
    run = gpu.Run(tmp_path, "cuda", 1.0, ["selective_scan"], {}, "command")
    run.run(["machine", "correctness", "ops"])
    checked = items(tasks, "correctness", "problem", "dtype")
    count = len(gpu_parts.CHECKED["selective_scan"])
    assert len(checked) == 3 * count + 1 + count
    assert [row["dtype"] for row in run.report.wrong] == ["float16"] * count
    assert "RuntimeError: wrong" in run.report.page.read_text()


def report(folder):
    made = Report(folder, "python tools/gpu.py", lambda line: None)
    made.conditions = dict.fromkeys(CONDITIONS, "known")
    return made


def test_rows_are_added_to_those_of_earlier_runs_and_the_page_shows_the_last(tmp_path):
    for value in (1.0, 2.0):
        made = report(tmp_path)
        made.add({"part": "ops", "subject": "op", "what": "forward", "by": "visionmix", "value": value, "unit": "ms"})
    assert [row["value"] for row in rows(tmp_path)] == ["1", "2"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| op | forward | visionmix | 2 |" in page
    assert "| visionmix | 1 |" not in page


def test_the_page_compares_peers_with_us_and_us_with_the_floor(tmp_path):
    made = report(tmp_path)
    row = {"part": "ops", "subject": "op", "what": "forward", "unit": "ms", "p20": 1.9, "p80": 2.2}
    made.add(row | {"by": "visionmix", "value": 2.0, "limit": 0.5})
    made.add(row | {"by": "peer", "value": 3.0})
    made.add(row | {"by": "gone", "passed": False, "note": "not at hand"})
    page = made.page.read_text()
    assert "| op | forward | visionmix | 2 | 1.9 to 2.2 | 1 | 0.5 | 4 |" in page
    assert "| op | forward | peer | 3 | 1.9 to 2.2 | 1.5 | 0.5 | 6 |" in page
    assert "| ops | op |  | forward | gone |  | not at hand |" in page
    assert made.wrong == []


def test_the_page_names_the_worst_result_and_a_failed_check_fails_the_run(tmp_path):
    made = report(tmp_path)
    row = {"part": "correctness", "subject": "scan 3x4", "dtype": "float32", "limit": 1e-5, "unit": "", "note": ""}
    made.add(row | {"what": "out", "value": 1e-6, "passed": True})
    assert made.wrong == []
    made.add(row | {"what": "gradient of A", "value": float("nan"), "passed": False})
    assert len(made.wrong) == 1
    page = made.page.read_text()
    assert "1 of 2 results lie within" in page
    assert "| scan | float32 | 1 of 2 | nan | 1e-05 | gradient of A, 3x4 |" in page


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda x, run: x, True),
        (lambda x, run: x * 1.001, False),
        (lambda x, run: x.fill_(float("nan")), False),
        (lambda x, run: x * (1 + 1e-7 * run), False),  # a second run gives other bits
    ],
)
def test_wrong_and_unsteady_results_are_seen(change, passed, monkeypatch):
    made = []

    def results(call, arguments, implementation):
        if implementation == "reference":
            return {"out": torch.ones(3, dtype=torch.float64)}
        made.append(torch.utils.deterministic.fill_uninitialized_memory)
        return {"out": change(torch.ones(3), len(made))}

    monkeypatch.setattr(kernel_checks, "results", results)
    (problem,) = kernel_problems.TINY["selective_scan"]
    (found,) = kernel_checks.check(problem.run, torch.float32, "cpu")
    assert found.passed == passed
    assert made == [True, True]


def test_the_sweep_changes_constants_that_exist():
    assert set(gpu_parts.TILES) == set(kernel_problems.PROBLEMS)
    for op, tiles in gpu_parts.TILES.items():
        for module, constant, values in tiles:
            now = getattr(importlib.import_module(f"visionmix.kernels.{op}.{module}"), constant)
            assert all(type(value) is type(now) and value != now for value in values), constant


def cross_scan(x, in_channel_first, out_channel_first, scans):
    assert (in_channel_first, out_channel_first, scans) == (True, True, 0)
    both = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
    return torch.cat([both, both.flip(-1)], 1)


def cross_merge(ys, in_channel_first, out_channel_first, scans):
    assert (in_channel_first, out_channel_first, scans) == (True, True, 0)
    *_, height, width = ys.shape
    ys = ys.flatten(3)
    both = ys[:, :2] + ys[:, 2:].flip(-1)
    return both[:, 0] + both[:, 1].unflatten(-1, (width, height)).mT.flatten(2)


def cuda_scan(u, delta, A, B, C, D, *rest):
    """Stand for the extension: mamba_ssm's takes (z, bias, softplus), VMamba's (bias, softplus, rows, float32 out)."""
    bias = rest[0] if len(rest) == 4 else rest[1]
    assert (rest[1:] == (True, 1, True)) if len(rest) == 4 else (rest[0] is None and rest[2] is True)
    return kernels.selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True), None


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("selective_scan", kernel_problems.selective_scan(8, 20, 4, batch=2, gate=False)),
        ("selective_scan_2d", kernel_problems.selective_scan_2d(5, 4, 8, 2, rank=3, batch=2)),
    ],
)
def test_peers_take_the_same_tensors_in_their_own_layout(op, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.SimpleNamespace(fwd=cuda_scan))
    monkeypatch.setitem(sys.modules, "selective_scan_cuda_oflex", types.SimpleNamespace(fwd=cuda_scan))
    maps = types.SimpleNamespace(cross_scan_fn=cross_scan, cross_merge_fn=cross_merge)
    monkeypatch.setitem(sys.modules, "csm_triton", maps)
    arguments = call.arguments(Tensors(torch.float32, "cpu"))
    expected = getattr(torch.ops.visionmix, op)(*arguments)[0]
    (peer,) = gpu_peers.PEERS[op]
    ready = peer.prepare(arguments)
    with torch.no_grad():
        out = ready.view(ready.function(*ready.tensors))
    assert out.shape == expected.shape
    assert kernel_checks.relative_error(out, expected) < 1e-5


def test_a_peer_that_is_not_at_hand_says_how_to_bring_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    (problem,) = kernel_problems.TINY["selective_scan"]
    with pytest.raises(gpu_peers.Missing, match="--peer mamba_ssm=FOLDER, a clone of state-spaces/mamba"):
        gpu_peers.PEERS["selective_scan"][0].prepare(problem.run.arguments(Tensors(torch.float32)))


def test_sources_are_compiled_with_names_that_cuda_13_has(tmp_path, monkeypatch):
    sources = tmp_path / "clone" / "csrc" / "selective_scan"
    sources.mkdir(parents=True)
    (sources / "scan.cpp").write_text("")
    (sources / "scan.cu").write_text("cub::CTA_SYNC();")
    (sources / "scan.cuh").write_text("int lane = cub::LaneId();")
    asked = {}
    monkeypatch.setattr(
        "torch.utils.cpp_extension.load", lambda name, files, **options: asked.update(options, name=name, files=files)
    )
    gpu_peers.check_folder("mamba_ssm", tmp_path / "clone")
    gpu_peers.build_extension("mamba_ssm", tmp_path / "clone", tmp_path / "build")
    copy = tmp_path / "build" / "mamba_ssm" / "sources"
    assert asked["name"] == "selective_scan_cuda"
    assert asked["files"] == [str(copy / "scan.cpp"), str(copy / "scan.cu")]
    assert (copy / "scan.cu").read_text() == "__syncthreads();"
    assert (copy / "scan.cuh").read_text() == "int lane = (threadIdx.x & 31);"
    assert (sources / "scan.cu").read_text() == "cub::CTA_SYNC();"

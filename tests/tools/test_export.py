"""Exported files equal the model they were made from, say what they hold, and are refused where they do not fit."""

import csv
import subprocess
import sys

import pytest
import timm
import torch
from small_runs import Small
from torch import nn

from visionmix import create_mixer
from visionmix.tools import benchmark_exports, export, export_checks, export_files, models
from visionmix.tools.export_runs import is_compiled, open_file

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
LAST = {"onnx": "m.onnx", "openvino": "m.xml", "torchscript": "m.pt", "pt2": "m.pt2"}


def formats(*names):
    return pytest.mark.parametrize("name", names)


def need(name):
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package, reason=f"{name} needs {package}")


@pytest.fixture
def tiny(small, monkeypatch):
    """Let the model "small" have logits that differ from image to image, and take images of 32 pixels."""
    real = models.create_model

    def create_model(name, num_classes=3, **options):
        model = real(name, num_classes=num_classes, **options)
        if isinstance(model, Small):
            nn.init.normal_(model.head.weight)
            model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        return model

    monkeypatch.setattr(models, "create_model", create_model)


def call(name, out, *options, model="small"):
    arguments = [model, "--random-weights", "--format", name, "--out", str(out / LAST[name])]
    return export.main([*arguments, *map(str, options)])


@pytest.mark.parametrize(
    ("name", "options", "runs"),
    [
        ("onnx", ["--dynamic"], 6),
        ("onnx", ["--dynamic", "batch"], 2),
        ("onnx", ["--half", "--img-size", "32", "48"], 1),
        ("openvino", ["--dynamic"], 6),
        ("openvino", ["--half", "--batch", "2"], 1),
        ("torchscript", [], 1),
        ("torchscript", ["--half"], 1),
        ("pt2", ["--dynamic"], 6),
        pytest.param("pt2", ["--aot", "--dynamic"], 6, marks=pytest.mark.long),
    ],
)
def test_a_file_is_checked_and_says_what_it_holds(tiny, tmp_path, capsys, name, options, runs):
    need(name)
    assert call(name, tmp_path / "new", *options) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert sum("largest error" in line for line in lines) == runs
    assert lines[-1].startswith(f"wrote {tmp_path / 'new'}")
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == (["m.bin", "m.xml"] if name == "openvino" else [LAST[name]])
    if name == "onnx":
        assert b"stack_trace" not in (tmp_path / "new" / LAST[name]).read_bytes()
    run, about = open_file(tmp_path / "new" / LAST[name])
    assert (about["model"], about["precision"]) == ("small", "float16" if "--half" in options else "float32")
    assert about["input"]["mean"] == [0.5] * 3
    torch.manual_seed(0)
    model = models.create_model("small").eval()
    images = torch.randn(2 if options[-1:] == ["2"] else 1, 3, *((32, 48) if "48" in options else (32, 32)))
    tolerance = 1e-2 if "--half" in options else 1e-5
    with torch.inference_mode():
        assert torch.allclose(run(images), model(images), atol=tolerance)


@formats("onnx", "openvino")
def test_int8_is_calibrated_on_pictures_and_agrees_on_others(tiny, tree, tmp_path, capsys, name):
    need(name)
    options = ["--int8", "--calibrate", tree / "train", "--images", tree / "val"]
    assert call(name, tmp_path / "new", *options) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("the likeliest class")]
    agreed, count = (int(word) for word in line.split() if word.isdigit())
    assert count == 9
    assert agreed >= 8
    error = float(out.split("largest error ")[1].split()[1])
    # It is not the model in float32, and noise exceeds the values that pictures have, which are cut off there.
    assert 1e-4 < error < 0.5
    assert open_file(tmp_path / "new" / LAST[name])[1]["precision"] == "int8"


def test_int8_files_compute_the_same_with_the_kernels_of_every_cpu(tiny, tree, tmp_path, capsys):
    """Products of 8 bits that a CPU without VNNI adds in 16 do not saturate: plain kernels give the same logits."""
    need("onnx")
    assert call("onnx", tmp_path, "--int8", "--calibrate", tree / "train") == 0, capsys.readouterr().err
    onnxruntime = pytest.importorskip("onnxruntime")
    # Beyond the range of the pictures, where many activations have their largest value.
    images = 10 * torch.randn(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / LAST["onnx"], plain, providers=["CPUExecutionProvider"])
    run, _ = open_file(tmp_path / LAST["onnx"])
    for each in images:
        expected = torch.from_numpy(session.run(None, {"images": each.numpy()})[0])
        assert (run(each) - expected).abs().max() <= 0.01 * expected.abs().max()


@formats("torchscript", pytest.param("pt2", marks=pytest.mark.long))
def test_files_run_where_visionmix_is_not_installed(tmp_path, capsys, name):
    """With the scans and attention of this library as PyTorch's own operators."""
    options = ["--img-size", "64", *(["--dynamic", "batch"] if name == "pt2" else [])]
    assert call(name, tmp_path, *options, model="test_vim_tiny") == 0, capsys.readouterr().err
    load = "torch.jit.load(p)" if name == "torchscript" else "torch.export.load(p).module()"
    code = f"""import sys; sys.modules["visionmix"] = None
import torch
p = {str(tmp_path / LAST[name])!r}
images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
torch.save({load}(images), {str(tmp_path / "logits.pt")!r})"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model = timm.create_model("test_vim_tiny").eval()
    with torch.inference_mode():
        expected = model(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_fused_ops_are_kept_only_where_they_are_asked_for(tmp_path, capsys):
    options = ["--img-size", "64", "--dynamic"]
    assert call("torchscript", tmp_path, *options, model="test_vim_tiny") == 2
    assert "calls visionmix::scan_order, visionmix::selective_scan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert call("torchscript", tmp_path, *options, "--fused", model="test_vim_tiny") == 0
    assert "visionmix::selective_scan" in str(torch.jit.load(tmp_path / "m.pt").inlined_graph)
    assert capsys.readouterr().out.count("largest error") == 6


def test_a_model_that_does_not_script_is_said_with_the_remedy(tiny, tmp_path, capsys):
    assert call("torchscript", tmp_path, "--dynamic") == 2
    assert "TorchScript does not compile Small" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("onnx", ["--out", "m.pt2"], r"--out=m.pt2 does not end in .onnx"),
        ("onnx", ["--fused"], "--fused is for --format torchscript or pt2, not for onnx"),
        ("onnx", ["--aot"], "--aot is for --format pt2"),
        ("pt2", ["--int8"], "--int8 is for --format onnx or openvino"),
        ("pt2", ["--opset", "20"], "--opset is for"),
        ("pt2", ["--aot", "--fused"], "leave --fused out"),
        ("onnx", ["--int8"], "--int8 and --calibrate FOLDER need each other"),
        ("onnx", ["--calibrate", "."], "--int8 and --calibrate FOLDER need each other"),
        ("onnx", ["--int8", "--calibrate", ".", "--half"], "exclude each other"),
        ("onnx", ["--int8", "--calibrate", "/nowhere"], "/nowhere does not exist"),
        ("torchscript", ["--images", "/nowhere"], "/nowhere does not exist"),
        ("onnx", ["--dynamic", "--batch", "4"], "--batch=4 is for files of one batch size"),
        ("pt2", ["--img-size", "0"], r"--img-size=\[0\] is no size"),
        ("pt2", ["--batch", "0"], "batch=0 is too small"),
        ("pt2", ["--img-size", "2"], "does not take RGB images"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tiny, tmp_path, capsys, name, options, message):
    need(name)
    assert call(name, tmp_path, *options) == 2
    error = capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call("onnx", tmp_path) == 2
    assert "pip install 'visionmix[export]'" in capsys.readouterr().err


def test_a_file_that_computes_something_else_does_not_replace_the_earlier_one(tiny, tmp_path, monkeypatch, capsys):
    write = export_files.to_torchscript

    def wrong(module, *arguments, **options):
        with torch.no_grad():
            other = Small(3)
            other.load_state_dict({key: 1.001 * value for key, value in module.state_dict().items()})
        return write(other.eval(), *arguments, **options)

    (tmp_path / "m.pt").write_text("earlier")
    monkeypatch.setattr(export_files, "to_torchscript", wrong)
    assert call("torchscript", tmp_path) == 2
    assert "more than 1.0e-04" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert (tmp_path / "m.pt").read_text() == "earlier"


def test_differences_are_what_they_are():
    def model(images):
        return images.flatten(1)

    images = torch.tensor([[0.0, 4.0], [3.0, 1.0]]).view(2, 2, 1, 1)
    found = export_checks.compare(lambda x: model(x) + torch.tensor([1.5, -1.5]), model, images)
    assert (found.error, found.relative, found.agreed) == (1.5, 0.375, 2)
    assert export_checks.compare(lambda x: model(x).flip(1), model, images).agreed == 0
    assert export_checks.agreement(model, model, [*images, *images, images[0]], 2) == (4, 4)
    with pytest.raises(ValueError, match="not finite"):
        export_checks.compare(lambda x: model(x) / 0, model, images)
    with pytest.raises(ValueError, match=r"returns \(2, 1\), the model \(2, 2\)"):
        export_checks.compare(lambda x: model(x)[:, :1], model, images)


def test_a_file_may_lie_as_far_from_the_model_as_float32_makes_the_model_lie_from_float64():
    class Cancels(nn.Module):
        def forward(self, images):
            return (images + 4096.0).flatten(1) - 4096.0

    images, model = torch.tensor([[0.10001, 0.7], [0.3, 0.2]]).view(2, 2, 1, 1), Cancels()
    exactly = export_checks.compare(lambda x: x.flatten(1), model, images, exact=True)
    assert export_checks.TOLERANCE < exactly.relative <= exactly.allowed
    assert exactly.rounding == pytest.approx(exactly.relative, rel=1e-3)
    assert "own rounding error" in str(exactly)
    wrong = export_checks.compare(lambda x: 1.002 * x.flatten(1), model, images, exact=True)
    assert wrong.relative > wrong.allowed


def test_a_file_that_does_not_run_is_a_sentence():
    def tied(images):
        raise AssertionError("Guard failed: x.size()[3] <= 112")

    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\): Guard failed.*export at a larger one"):
        export_checks.compare(tied, nn.Flatten(), torch.zeros(1, 3, 8, 8))


def test_what_a_runtime_says_without_where_it_stood():
    error = RuntimeError("Exception from core.cpp:117:\nCheck 'x' failed:\n\nDoesn't support dynamic weights shape\n")
    assert export_files.reason(error) == "Doesn't support dynamic weights shape"
    assert export_files.reason(RuntimeError("")) == "RuntimeError"


def test_axes_that_cannot_be_dynamic_are_named():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.sum() if x.shape[2] == 8 else x

    class Square(nn.Module):
        def forward(self, x):
            return x + x.transpose(2, 3)

    axes = export_files.DYNAMIC["all"]
    with pytest.raises(ValueError, match="dynamic height: Fixed computes with that length as a number"):
        export_files.to_program(Fixed(), torch.randn(2, 3, 8, 9), dynamic=axes)
    with pytest.raises(ValueError, match="which would have to stay equal"):
        export_files.to_program(Square(), torch.randn(2, 3, 9, 9), dynamic=axes)


def test_an_operator_that_onnx_does_not_know_is_said(tmp_path):
    need("onnx")
    mixer = create_mixer("gated_delta_rule", 8, num_heads=2).eval()
    with pytest.raises(ValueError, match=r"ONNX cannot hold this model.*triangular"):
        export_files.to_onnx(mixer, torch.randn(2, 3, 4, 8), tmp_path / "m.onnx")


@pytest.mark.long
def test_compiled_packages_run_without_visionmix(tmp_path, capsys):
    options = ["--img-size", "64", "--aot", "--dynamic", "batch"]
    assert call("pt2", tmp_path, *options, model="test_agent_deit_tiny") == 0, capsys.readouterr().err
    assert is_compiled(tmp_path / "m.pt2")
    code = f"""import sys; sys.modules["visionmix"] = None
import torch
from torch._inductor import aoti_load_package
assert aoti_load_package({str(tmp_path / "m.pt2")!r})(torch.randn(3, 3, 64, 64)).shape == (3, 1000)"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_timed_files_are_of_one_model(tiny, tmp_path, monkeypatch, capsys):
    """PyTorch first, then each file, in turns."""
    monkeypatch.setattr(timm, "create_model", models.create_model)
    monkeypatch.setattr(benchmark_exports.timing, "wait_until_quiet", lambda: None)
    assert call("torchscript", tmp_path) == 0
    assert call("pt2", tmp_path, "--dynamic", "batch") == 0
    capsys.readouterr()

    def in_turns(calls, rounds):
        assert [run().shape for run in calls.values()] == [(2, 3)] * 3
        scales = zip(calls, (1, 2, 4), strict=True)
        return {name: [scale * each for each in (1.0, 2.0, 3.0)[:rounds]] for name, scale in scales}

    monkeypatch.setattr(benchmark_exports.timing, "in_turns", in_turns)
    files = [str(tmp_path / name) for name in ("m.pt", "m.pt2", "times.csv")]
    arguments = [*files[:2], "--batch", "2", "--threads", "1", "--turns", "3", "--csv", files[2]]
    assert benchmark_exports.main(arguments) == 0
    rows = list(csv.DictReader((tmp_path / "times.csv").open()))
    programs = ["PyTorch", "TorchScript, float32", "torch.export, float32, dynamic batch"]
    assert [row["program"] for row in rows] == programs
    assert [row["p50_ms"] for row in rows] == ["2000", "4000", "8000"]
    assert [row["times_pytorch"] for row in rows] == ["1", "2", "4"]
    assert benchmark_exports.main([*arguments, "--turns", "0"]) == 1
    assert "turns=0 is too small" in capsys.readouterr().out
    assert call("torchscript", tmp_path, "--img-size", "64") == 0
    assert benchmark_exports.main(arguments) == 1
    assert len((tmp_path / "times.csv").read_text().splitlines()) == 4

"""What commands write over: never a file of another kind, never half of one."""

import argparse
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from visionmix.tools import (
    bakeoff,
    benchmark,
    benchmark_adaptive,
    benchmark_exports,
    benchmark_kernels,
    checkpoint,
    compile_kernels,
    draw_predictions,
    draw_receptive_field,
    export,
    export_files,
    info,
    reduce_curve,
    timing,
)
from visionmix.tools.arguments import check_out
from visionmix.tools.rows import append_rows

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_files_of_weights_can_be_read_as_others(tmp_path):
    checkpoint.save_weights(tmp_path / "m.safetensors", {"a": torch.zeros(2)}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_table_of_another_program_keeps_its_only_line(tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("precious single line of notes")
    with pytest.raises(ValueError, match="other columns"):
        append_rows(path, [{"model": "vig_t"}], ("model",))
    assert path.read_text() == "precious single line of notes"


def test_rows_are_added_to_a_last_line_without_an_end(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("model,ms\nvig_t,1")
    timing.append_rows(path, [{"model": "vig_s", "ms": 2}])
    assert path.read_text().splitlines() == ["model,ms", "vig_t,1", "vig_s,2"]


def test_of_two_files_none_is_moved_where_the_disk_refuses_one(tmp_path, monkeypatch):
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text("earlier")
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    def write():
        with export_files.staged(tmp_path / "m.xml") as aside:
            aside.write_text("new")
            aside.with_suffix(".bin").write_text("new")

    with pytest.raises(OSError, match="No space"):
        write()
    assert {path.read_text() for path in tmp_path.iterdir()} == {"earlier"}


@pytest.mark.parametrize("place", ["folder", "file/x.png", "x.csv"])
def test_places_that_cannot_be_written_are_named(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out=.*" + Path(place).name):
        check_out(tmp_path / place, (".png",) if place == "x.csv" else ())


def test_a_picture_does_not_replace_a_table(tmp_path, capsys):
    (tmp_path / "keep.csv").write_text("a,b\n")
    assert draw_receptive_field.main(["test_vig_h", "--img-size", "64", "--out", str(tmp_path / "keep.csv")]) == 2
    assert "does not end in .png" in capsys.readouterr().err
    assert (tmp_path / "keep.csv").read_text() == "a,b\n"


@pytest.mark.parametrize(
    "about",
    ["[1]", '"x"', "{bad", '{"recipe": 3}', '{"recipe": {"model": 3}, "classes": []}', '{"ema": 3}',
     '{"recipe": {"model": {"name": "vig_t"}}}', '{"input": {"image_size": "big"}}',
     '{"recipe": {"model": {"name": "vig_t", "kwargs": 3}}, "classes": ["a"]}'],
)  # fmt: skip
def test_metadata_is_data_until_it_is_proved_a_checkpoint(about, tmp_path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"visionmix": about})
    with pytest.raises(ValueError, match=r"x\.safetensors is no checkpoint of visionmix train"):
        checkpoint.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "content"), [("m.pt2", b"x"), ("m.pt", b"x"), ("m.onnx", b"x")])
def test_damaged_files_are_named(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    assert benchmark_exports.main([str(tmp_path / name), "--csv", str(tmp_path / "rows.csv")]) == 1
    assert name in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "value"), [("num_classes", -1), ("num_classes", 0), ("opset", 0), ("batch", 0), ("images_most", 0)]
)
def test_counts_of_an_export_are_named(option, value, tmp_path):
    given = export.parser().parse_args(["vig_t", "--random-weights", "--format", "onnx", "--out", "m.onnx"])
    with pytest.raises(ValueError, match=f"{option}={value}"):
        export.check_arguments(argparse.Namespace(**{**vars(given), option: value}))


@pytest.mark.parametrize("folder", ["calibrate", "images"])
def test_a_number_of_pictures_needs_its_folder(folder):
    arguments = ["vig_t", "--random-weights", "--format", "onnx", "--out", "m.onnx", f"--{folder}-most", "5"]
    with pytest.raises(ValueError, match=f"--{folder}-most=5 .* --{folder} FOLDER"):
        export.check_arguments(export.parser().parse_args(arguments))


def test_fewer_pictures_than_a_batch_are_refused_before_the_model_is_loaded(tmp_path, capsys):

    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    options = ["--random-weights", "--format", "torchscript", "--batch", "8", "--images", str(tmp_path)]
    assert export.main(["no_such_model", *options, "--out", str(tmp_path / "m.pt")]) == 2
    assert "has 1 pictures, fewer than --batch=8" in capsys.readouterr().err


def test_info_counts_at_no_size_below_one(capsys):
    with pytest.raises(SystemExit):
        info.main(["vig_t", "--img-size", "0"])
    assert "img_size=0 is too small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threads", "0"), "--threads=0"),
        (("--batch", "0"), "--batch=0"),
        (("--img-size", "-1"), "--img-size=-1"),
        (("--turns", "-1"), "--turns=-1"),
        (("--reduce", "foo"), "unknown method='foo'"),
        (("--reduce", "tome:r=x"), "r=x is no number"),
        (("--csv", "."), "--csv=. is a folder"),
        pytest.param(("--device", "cuda"), "--device 'cuda' cannot be used", marks=WITHOUT_GPU),
    ],
)
def test_benchmark_refuses_before_it_times(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "build", None)
    with pytest.raises(SystemExit):
        benchmark.main(["test_vig", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        (bakeoff, "demo/bakeoff.yaml --data . --nproc-per-node 0", "nproc_per_node=0"),
        (bakeoff, "demo/bakeoff.yaml --data . --output pyproject.toml", "lies below"),
        (benchmark_adaptive, "test_vig --batch 0", "batch=0"),
        (benchmark_adaptive, "test_vig --share 2", "--share=2.0"),
        (benchmark_adaptive, "no_such_model", "model='no_such_model' is not known"),
        (benchmark_adaptive, "test_vmamba", "finds no layer"),
        (benchmark_kernels, "--threads 0", "threads=0"),
        (benchmark_kernels, "--batch 0", "batch=0"),
        (benchmark_kernels, "--skip nobody", "'nobody'"),
        (benchmark_kernels, "--csv .", "--csv=. is a folder"),
        (compile_kernels, "--op selective_scan --problem nothing", "--problem 'nothing' is none of selective_scan"),
        (compile_kernels, "--json .", "--json=. is a folder"),
        (compile_kernels, "--markdown pyproject.toml/a.md", "lies below"),
        (draw_predictions, "c.py x.pth --out a.png --count 0", "count=0"),
        (draw_predictions, "c.py x.pth --out .", "--out=. is a folder"),
        (reduce_curve, "test_vig --pretrained --data . --csv .", "--csv=. is a folder"),
        (reduce_curve, "test_vig --pretrained --data . --out .", "--out=. is a folder"),
    ],
)
def test_tools_refuse_before_they_work(tool, arguments, said, capsys):
    try:
        status = tool.main(arguments.split())
    except SystemExit as error:
        status = error.code
    assert status
    assert said in capsys.readouterr().err


def test_every_peer_of_an_op_can_be_skipped():
    setting = benchmark_kernels.Setting("cpu", torch.float32, 1)
    peers = {peer for make in benchmark_kernels.cases(setting).values() for peer in make().peers}
    assert peers == set(benchmark_kernels._PEERS) - {"mamba_ssm"}  # which is timed on a GPU alone

"""Compiled, exported and counted: one graph for all sizes."""

import pytest
import timm
import torch
from accelerator import DEVICES
from tiny_models import TINY
from torch._dynamo.utils import counters
from torch.export import Dim

from visionmix.tools.export_files import to_onnx
from visionmix.tools.export_runs import open_file

SIZES = [(96, 128), (96, 96), (225, 193)]
# Inductor simplifies the indices of their groups and pooled maps symbolically, for over a quarter of an hour; or it
# makes a graph more, since it decides by a loop's length whether threads are worth their start (above 4096 steps).
SLOW = {"test_sgformer", "test_transnext", "test_ecoformer", "test_favit", "test_soft", "test_softpp"}
GRAPHS = [(name, each) for name in TINY for each in ("aot_eager", "inductor") if name not in SLOW or each != "inductor"]


@pytest.mark.long
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(SLOW))
def test_compiled_for_one_size(name, device):
    model, images = timm.create_model(name).eval().to(device), torch.randn(2, 3, 96, 128, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("name", "backend"), GRAPHS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_compiled_graph_serves_all_sizes(name, device, backend):
    model = timm.create_model(name).eval().to(device)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(2, 3, *size, device=device)
            assert torch.allclose(compiled(images), model(images), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


# Every model's graphs are tested; one of one model in the quick suite too, since each takes up to a minute.
@pytest.mark.parametrize("name", [n if n == "test_plain" else pytest.param(n, marks=pytest.mark.long) for n in TINY])
def test_exported_for_any_size(name):
    model = timm.create_model(name).eval()
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(axes,))
    images = torch.randn(3, 3, 128, 160)
    assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_onnx_runs_what_the_model_computes(name, tmp_path):
    pytest.importorskip("onnxruntime")
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 64, 96)
    to_onnx(model, images, tmp_path / "model.onnx")
    run, _ = open_file(tmp_path / "model.onnx")
    assert torch.allclose(run(images), model(images), atol=1e-4)

"""ONNX with dynamic batch, height and width: every tiny model, run at other sizes than it was exported at."""

import pytest
import timm
import torch
from tiny_models import TINY
from torch.export import Dim

import visionmix
from visionmix import create_mixer

# Those that patches, windows and stripes divide and those that they do not, one image and several.
IMAGES = ((2, 3, 64, 96), (3, 3, 96, 128), (1, 3, 101, 75), (4, 3, 160, 64))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def runs_at_all(shapes, model, path):
    """Export `model` with the first of `shapes` as its example, and compare what both compute for each of them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    axes = {axis: Dim.AUTO for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}
    example = torch.randn(shapes[0])
    with visionmix.kernels.use("reference"):
        torch.onnx.export(model, (example,), path, dynamo=True, verbose=False, dynamic_shapes=(axes,))
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    assert all(isinstance(given.shape[axis], str) for axis in axes), f"{given.shape} is not dynamic"
    for shape in shapes:
        x = torch.randn(shape)
        (out,) = session.run(None, {given.name: x.numpy()})
        expected = model(x)
        # Untrained models give logits close to 0: the error is measured by their spread.
        assert torch.allclose(torch.from_numpy(out), expected, atol=1e-4 * min(1.0, expected.std().item())), shape


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_models_run_at_sizes_they_were_not_exported_at(name, tmp_path):
    runs_at_all(IMAGES, timm.create_model(name).eval(), tmp_path / "model.onnx")


@pytest.mark.long
def test_windows_and_stripes_run_at_sizes_they_were_not_exported_at(tmp_path):
    mixer = [{"name": "window", "window_size": 3, "shift": True}, {"name": "cross_window", "split_size": 3}]
    model = timm.create_model("test_plain", mixer=mixer, depth=2, num_classes=10)
    runs_at_all(IMAGES, model.eval(), tmp_path / "model.onnx")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"window_size": 6}),
        ("cross_window", {"split_size": 6}),
        ("self_guided", {"group_sizes": [6, 12, 6]}),
    ],
)
def test_an_example_of_one_window_stripe_or_group_serves_maps_of_several(name, options, tmp_path):
    maps = ((2, 4, 6, 8), (3, 9, 11, 8), (1, 20, 13, 8))
    runs_at_all(maps, create_mixer(name, 8, num_heads=2, **options).eval(), tmp_path / "mixer.onnx")

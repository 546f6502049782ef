"""ONNX with dynamic batch, height and width: every family's tiny model, run at another size than it was exported at."""

import pytest
import timm
import torch
from torch.export import Dim

import visionmix

# Families whose dynamic export is proved; docs/performance.md says so. Windows and stripes cut maps by remainders of
# symbolic sizes, which PyTorch's exporter does not translate.
ANY = pytest.mark.parametrize("name", ["test_dinat", "test_vim_tiny"])
AXES = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}


@ANY
def test_dynamic_onnx_runs_at_another_size(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = timm.create_model(name).eval(), torch.randn(2, 3, 64, 96)
    with visionmix.kernels.use("reference"):
        torch.onnx.export(
            model, (images,), tmp_path / "model.onnx", dynamo=True, verbose=False, dynamic_shapes=({**AXES},)
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    assert all(isinstance(given.shape[axis], str) for axis in AXES), f"{given.shape} is not dynamic"
    for size in ((2, 3, 64, 96), (3, 3, 96, 128), (1, 3, 160, 64)):
        images = torch.randn(size)
        (logits,) = session.run(None, {given.name: images.numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images), atol=1e-4), size

"""Files with dynamic batch, height and width: every tiny model, run at other sizes than it was exported at."""

import importlib.util

import pytest
import timm
import torch
from tiny_models import TINY

from visionmix import create_mixer
from visionmix.mixers import SelfGuidedAttention
from visionmix.models.family import family_of, list_family_models
from visionmix.tools import export
from visionmix.tools.export_checks import compare
from visionmix.tools.export_files import DYNAMIC, to_onnx, to_openvino, to_pt2, to_torchscript
from visionmix.tools.export_runs import open_file

# Without timm's own ViT, whose position embeddings are exported as they are resampled for the example; `visionmix
# export` compares other sizes and refuses the file.
SERVED = [name for name in TINY if name != "test_dynamicvit"]

# OpenVINO convolves with kernels of one length alone, and M2-ViT's are as long as the sequence.
ONNX_ALONE = ("test_m2_vit",)

# The first variant of each family that is no tiny model, by the family's module.
FULL = {family_of(name).module: name for name in reversed(list_family_models()) if name not in TINY}

# Those that patches, windows and stripes divide and those that they do not, one image and several.
IMAGES = ((2, 3, 64, 96), (3, 3, 96, 128), (1, 3, 101, 75), (4, 3, 160, 64))
# The smallest map of MSVMamba has a 64th of the image's rows; one of a single row would tie the program to it.
LARGER = tuple((batch, 3, height + 64, width + 64) for batch, _, height, width in IMAGES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def runs_at_all(shapes, model, path):
    """Export `model` with the first of `shapes` as its example, and compare what both compute for each of them."""
    pytest.importorskip("onnxruntime")
    axes = {axis: f"axis{axis}" for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}
    to_onnx(model, torch.randn(shapes[0]), path, dynamic=axes)
    equals_at_all(shapes, open_file(path)[0], model)


def equals_at_all(shapes, run, model):
    for shape in shapes:
        images = torch.randn(shape)
        if any(isinstance(module, SelfGuidedAttention) for module in model.modules()):
            # Two cells whose significances are nearly equal are ranked by their last bits.
            difference = compare(run, model, images, exact=True)
            assert difference.relative <= difference.allowed
            continue
        expected = model(images)
        # Untrained models give logits close to 0: the error is measured by their spread.
        assert torch.allclose(run(images), expected, atol=1e-4 * min(1.0, expected.std().item())), shape


# Each takes seconds. In the quick suite tests/tools/test_export_example.py exports a model so and runs it at two sizes.
@pytest.mark.long
@pytest.mark.parametrize("name", SERVED)
def test_models_run_at_sizes_they_were_not_exported_at(name, tmp_path):
    """In ONNX Runtime, and in OpenVINO what it makes of the same file."""
    model = timm.create_model(name).eval()
    runs_at_all(IMAGES, model, tmp_path / "model.onnx")
    if importlib.util.find_spec("openvino"):
        to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
        if name in ONNX_ALONE:
            with pytest.raises(ValueError, match=r"OpenVINO cannot run model.xml: .*dynamic weights.*a size at a time"):
                open_file(tmp_path / "model.xml")
            return
        equals_at_all(IMAGES, open_file(tmp_path / "model.xml")[0], model)


@pytest.mark.long
@pytest.mark.parametrize("name", SERVED)
def test_models_as_programs_and_traces_in_operators_of_pytorch(name, tmp_path):
    model = timm.create_model(name).eval()
    images = LARGER if name.startswith("test_msvmamba") else IMAGES
    example = torch.randn(images[0])
    assert to_torchscript(model, example, tmp_path / "model.pt") == []
    equals_at_all(images[:1], open_file(tmp_path / "model.pt")[0], model)
    to_pt2(model, example, tmp_path / "model.pt2", dynamic=DYNAMIC["all"])
    equals_at_all(images, open_file(tmp_path / "model.pt2")[0], model)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(FULL.values()))
def test_a_model_of_each_family_runs_at_any_size_from_a_file(name, tmp_path, capsys):
    """The command compares file and model for three sizes and two numbers of images."""
    # timm's ViT serves any batch, but one size: see SERVED.
    dynamic = "batch" if name.startswith("dynamicvit") else "all"
    options = ["--random-weights", "--format", "onnx", "--img-size", "128", "--dynamic", dynamic]
    status = export.main([name, *options, "--out", str(tmp_path / "m.onnx")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert printed.out.count("largest error") == {"batch": 2, "all": 6}[dynamic]


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

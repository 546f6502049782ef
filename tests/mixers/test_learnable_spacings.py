"""Convolutions with learnable spacings against the published code and their definition; positions that blocks share."""

import itertools
import math

import golden
import pytest
import timm
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import SpacedKernel
from visionmix.models import load_checkpoint

VERSIONS = ["v0", "v1", "max", "gauss"]


def share(version, distance, sigma):
    if version == "gauss":
        return math.exp(-(distance**2) / (2 * (0.27 + abs(sigma)) ** 2))
    return max(0.0, 1 + abs(sigma) - abs(distance))


def defined(layer, weight):
    """Return the kernel, weight by weight and cell by cell."""
    size = 2 * layer.reach + 1
    out = torch.zeros(*weight.shape[:2], size, size, dtype=torch.float64)
    for o, i, n in itertools.product(*map(range, weight.shape)):
        row, column = layer.positions[:, o, i, n].tolist()
        sigma = [0.0, 0.0] if layer.sigma is None else layer.sigma[:, o, i, n].tolist()
        shares = torch.tensor(
            [
                [
                    share(layer.version, r - layer.reach - row, sigma[0])
                    * share(layer.version, c - layer.reach - column, sigma[1])
                    for c in range(size)
                ]
                for r in range(size)
            ],
            dtype=torch.float64,
        )
        out[o, i] += weight[o, i, n].item() * (shares if layer.version == "v0" else shares / (shares.sum() + 1e-7))
    return out


def spaced(version, **sizes):
    torch.manual_seed(0)
    layer = SpacedKernel(3, 2, version=version, dtype=torch.float64, **sizes)
    with torch.no_grad():
        layer.positions.uniform_(-layer.reach - 1, layer.reach + 1)  # some beyond the border
        if layer.sigma is not None:
            layer.sigma.normal_()
    return layer


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("kernel_size", "kernel_count"), [(5, 4), (1, 1), (3, 7)])
def test_kernels_equal_the_definition(version, kernel_size, kernel_count):
    layer = spaced(version, kernel_size=kernel_size, kernel_count=kernel_count)
    weight = torch.randn(3, 2, kernel_count, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(layer(weight), defined(layer, weight), atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_convolutions_equal_the_published(version):
    meta, arrays = golden.load(f"dcls2d_{version}")
    kwargs, state = meta["kwargs"], golden.state_dict(meta)
    sizes = {"kernel_size": kwargs["dilated_kernel_size"], "kernel_count": kwargs["kernel_count"]}
    groups = kwargs["groups"]
    layer = SpacedKernel(kwargs["out_channels"], 3 // groups, version=version, dtype=torch.float64, **sizes)
    positions = state["0.P"].double() * (2 * math.sqrt(state["0.P"][0].numel()))  # as the golden's note says
    with torch.no_grad():
        layer.positions.copy_(positions if version == "v0" else positions.flip(0))
        layer.set_progress(0.5)  # clamps them
        if layer.sigma is not None:
            layer.sigma.copy_(state["0.SIG"].flip(0))
    image = golden.image(*meta["image_size"], channels=kwargs["in_channels"], seed=meta["seed"])
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        kernel = layer.to(dtype)(state["0.weight"].to(dtype))
        bias, padding = state["0.bias"].to(dtype), kwargs["padding"]
        out = F.conv2d(image.to(dtype), kernel, bias, padding=padding, groups=groups)
        assert golden.relative_error(out, arrays["logits"]) <= bound


def test_bilinear_positions_have_gradients_on_cells_and_on_the_border():
    layer = SpacedKernel(1, kernel_size=3, kernel_count=1, dtype=torch.float64)
    with torch.no_grad():
        layer.positions.copy_(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1))
    upstream = torch.arange(9.0, dtype=torch.float64).reshape(1, 1, 3, 3)
    layer(torch.ones(1, 1, 1, dtype=torch.float64)).backward(upstream)
    # Down, the weight leaves the kernel; to the right, it goes from the cell of 7 to that of 8.
    assert layer.positions.grad.flatten().tolist() == [-7.0, 1.0]


def test_positions_come_back_to_the_border_and_do_not_decay():
    model = timm.create_model("test_convnext_dcls")
    positions = model.stages[2].spacings.positions
    with torch.no_grad():
        positions.fill_(9.0)
    model.set_progress(0.5)
    assert (positions == 8.0).all()
    assert {f"stages.{stage}.spacings.positions" for stage in range(4)} <= model.no_weight_decay()


def test_dcls_is_a_depthwise_convolution():
    mixer = drawn_mixer("dcls", kernel_size=5, kernel_count=3).double()
    x = torch.randn(2, 4, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        kernel = defined(mixer.spacings, mixer.weight)
        expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, mixer.bias, padding=2, groups=12).permute(0, 2, 3, 1)
        assert torch.allclose(mixer(x), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 is even"),
        ({"kernel_count": 0}, "kernel_count=0 leaves the kernel empty"),
        ({"version": "v2"}, "version='v2' is unknown"),
    ],
)
def test_dcls_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("dcls", 12, **options)


def test_blocks_of_a_stage_share_positions_that_files_repeat():
    meta, _ = golden.load("convnext_dcls_tiny")
    tensors = golden.state_dict(meta)
    model = timm.create_model("convnext_dcls_tiny", device="meta").to_empty(device="cpu")
    load_checkpoint(model, tensors)
    assert torch.equal(model.stages[2].spacings.positions, tensors["stages.2.5.dwconv.P"])
    assert not [key for key in model.state_dict() if "blocks" in key and "positions" in key]
    tensors["stages.2.5.dwconv.P"] += 1
    with pytest.raises(ValueError, match=r"become 'stages\.2\.spacings\.positions'"):
        load_checkpoint(model, tensors)


def test_a_stage_takes_other_mixers_and_one_kind_of_spacings():
    few, many = ({"name": "dcls", "kernel_count": count} for count in (3, 4))
    mixed = timm.create_model("test_convnext_dcls", mixer=["conv", few, [few, "conv"], many], num_classes=3)
    assert [stage.shares for stage in mixed.stages] == [False, True, False, True]
    assert mixed(torch.randn(1, 3, 64, 96)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"several \(kernel_count, kernel_size, version\) in one stage, \[\(3, 17, "):
        timm.create_model("test_convnext_dcls", mixer=[few, few, [few, many], few])


def test_convnext_dcls_begins_as_published():
    torch.manual_seed(0)
    model = timm.create_model("test_convnext_dcls", embed_dims=(64, 64, 64, 64))
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            assert (value == 1e-6).all()
        elif name.endswith("positions"):
            assert abs(value.std() / 0.5 - 1) < 0.2
        elif "norm" not in name:
            assert not value.any() if name.endswith("bias") else abs(value.std() / 0.02 - 1) < 0.2, name

"""RoMA's pre-training: what a prediction may depend on, its losses, the rotated regions, and the backbone after it."""

import math

import pytest
import timm
import torch
from torch.nn import functional as F

from visionmix.models import load_checkpoint
from visionmix.pretraining import choose_regions, patch_variety, rotate_regions

SMALL = {"backbone": "test_roma_arm", "img_size": 96, "window": 2, "region": 3, "decoder_dim": 32, "decoder_depth": 2}


def make(**options):
    torch.manual_seed(0)
    return timm.create_model("roma_pretraining", **SMALL | options)


def test_a_window_is_predicted_from_all_windows_before_it_alone():
    model, images = make().eval(), torch.randn(1, 3, 96, 96)
    before = model(images)
    assert before.shape == images.shape
    assert (before[:, :, :32, :32] == 0).all()
    for changed in range(9):
        other, (row, column) = images.clone(), divmod(changed, 3)
        other[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = torch.randn(3, 32, 32)
        moved = (model(other) - before).abs().amax(1)
        moved = F.max_pool2d(moved, 32).flatten() > 0
        assert moved.tolist() == [window > changed for window in range(9)]


def test_the_losses_are_those_of_normalised_patches_and_of_regions_averaged_to_a_patch():
    model, images = make(region_weight=0.5).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        predicted, losses = model.forward_train(images)
    assert torch.equal(predicted, model(images))
    error = predicted.clone()
    for row in range(0, 96, 16):
        for column in range(0, 96, 16):
            patch = images[:, :, row : row + 16, column : column + 16]
            mean, var = patch.mean((1, 2, 3), keepdim=True), patch.var((1, 2, 3), keepdim=True)
            error[:, :, row : row + 16, column : column + 16] -= (patch - mean) / (var + 1e-6).sqrt()
    outside = torch.cat([error[:, :, :32, 32:].flatten(), error[:, :, 32:].flatten()])
    assert losses["patches"].item() == pytest.approx(outside.square().mean().item(), rel=1e-5)
    regions = []
    for row, column in ((0, 48), (48, 0), (48, 48)):  # the first one holds the first window
        region = error[:, :, row : row + 48, column : column + 48]
        regions.append(region.unflatten(3, (16, 3)).unflatten(2, (16, 3)).mean((3, 5)))
    assert losses["regions"].item() == pytest.approx(0.5 * torch.stack(regions).square().mean().item(), rel=1e-5)


def test_every_parameter_learns_but_the_fixed_positions():
    model = make().train()
    sum(model.forward_train(torch.randn(2, 3, 96, 96))[1].values()).backward()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == ["backbone.pos_embed.weight"]
    assert {"rotated", "decoder.query", "backbone.pos_embed.weight"} <= model.no_weight_decay()


def test_training_rotates_what_the_backbone_sees_and_not_what_is_predicted(monkeypatch):
    model, images, seen = make().train(), torch.randn(2, 3, 96, 96), []
    monkeypatch.setattr(model, "_predict", lambda x, rotated: seen.append((x, rotated)) or torch.zeros_like(x))
    losses = model.forward_train(images)[1]
    (turned, rotated), changed = seen[0], (seen[0][0] != images).any(1)
    assert changed.any(2).any(1).all()
    assert not changed[~rotated.repeat_interleave(16, 1).repeat_interleave(16, 2)].any()
    assert not torch.equal(model._losses(torch.zeros_like(images), turned)["regions"], losses["regions"])
    model.eval().forward_train(images)
    assert seen[1][0] is images
    assert seen[1][1] is None


def test_variety_counts_the_patterns_of_a_patch():
    flat = torch.zeros(1, 1, 8, 16)
    flat[:, :, :, 8:] = torch.rand(1, 1, 8, 8)
    variety = patch_variety(flat.expand(1, 3, 8, 16), 8)
    assert variety.shape == (1, 1, 2)
    gray = F.pad(flat, [1, 1, 1, 1], mode="replicate")[0, 0]
    patterns = []
    for row in range(1, 9):
        for column in range(9, 17):
            around = gray[row - 1 : row + 2, column - 1 : column + 2].flatten()
            patterns.append(tuple((around >= gray[row, column]).tolist()))
    shares = [patterns.count(each) / 64 for each in set(patterns)]
    assert variety[0, 0, 1].item() == pytest.approx(1 - sum(share**2 for share in shares))
    assert variety[0, 0, 0] < variety[0, 0, 1]


def test_a_region_is_the_largest_that_is_worth_it():
    variety = torch.zeros(3, 6, 6)
    variety[0, 1, 4] = 1.0
    variety[1, 2:, 2:] = 0.5
    variety[1, 5, 5] = 0.6
    variety[2] = 1.0
    variety[2, 3, 3] = 2.0
    regions = choose_regions(variety, (2, 4, 6))
    assert regions[1].tolist() == [0, 0, 6]  # the whole image always has its own mean
    assert choose_regions(variety, (2, 4))[1].tolist() == [2, 2, 4]
    peaks = torch.full((1, 6, 6), 0.5)
    peaks[0, 0, 0] = 1.0
    peaks[0, 0:4, 0:4] -= 0.4
    assert choose_regions(peaks, (2, 4))[0].tolist() == [0, 0, 2]  # none has the mean: the smallest
    for (row, column, side), value in zip(regions.tolist(), variety, strict=True):
        best = value.flatten().argmax().item()
        assert row <= best // 6 < row + side
        assert column <= best % 6 < column + side


def test_rotation_by_a_right_angle_turns_the_region_alone():
    images = torch.randn(2, 3, 48, 64)
    regions, angles = torch.tensor([[0, 1, 2], [1, 2, 2]]), torch.tensor([math.pi / 2, -math.pi / 2])
    turned, inside = rotate_regions(images, regions, angles, 16)
    for index, (row, column) in enumerate(((0, 16), (16, 32))):
        expected = images[index].clone()
        part = expected[:, row : row + 32, column : column + 32]
        expected[:, row : row + 32, column : column + 32] = torch.rot90(part, 1 if index else -1, (1, 2))
        assert torch.allclose(turned[index], expected, atol=1e-4)
    assert inside.tolist() == [
        [[False, True, True, False], [False, True, True, False], [False] * 4],
        [[False] * 4, [False, False, True, True], [False, False, True, True]],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vim_tiny"}, "backbone='vim_tiny' has no pre-training here; give one of .*roma_arm_tiny"),
        ({"num_classes": 10}, "num_classes=10: pre-training has no classes"),
        ({"img_size": 80}, "80 x 80 pixels do not divide into squares of window=2 patches; .* multiple of 32"),
        ({"img_size": 64}, "64 x 64 pixels do not divide into squares of region=3"),
        ({"region": 6}, "leave no region=6 beside the first window=2"),
        ({"window": 0}, "window=0 is too small"),
        ({"decoder_dim": 30}, "decoder_dim=30 does not divide into heads"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_images_that_do_not_fit_and_published_weights_are_refused():
    with pytest.raises(ValueError, match="112 x 96 pixels do not divide into squares of window=2"):
        make()(torch.zeros(1, 3, 112, 96))
    with pytest.raises(ValueError, match="no published weights; its backbones have"):
        make(pretrained=True)


def test_images_of_other_sizes_in_half_precision_with_checkpoints():
    model, images = make().train(), torch.randn(2, 3, 96, 192)
    losses = {}
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            losses[checkpointing] = model.forward_train(images)[1]
    assert losses[False] == losses[True]
    assert all(torch.isfinite(value) for value in losses[True].values())


def test_the_backbone_goes_on_from_a_checkpoint(tmp_path):
    model = make()
    torch.nn.init.normal_(model.backbone.pos_embed.weight)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pt")
    overlay = {"file": str(tmp_path / "pretrained.pt")}
    fine = timm.create_model("test_roma_arm", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    own = model.backbone.state_dict()
    for name, value in fine.state_dict().items():
        source = name
        for scan in (1, 2, 3):
            source = source.replace(f".scans.{scan}.", ".scans.0.")
        if source in own:
            assert torch.equal(value, own[source]), name
        else:
            assert name.startswith(("class_token.", "norm.", "head.fc.")), name
    larger = timm.create_model("test_roma_arm", img_size=128)
    load_checkpoint(larger, overlay["file"])
    assert larger.pos_embed.weight.shape == (1, 8, 8, 32)

"""VAN's initial weights, and what its published weights were tested on."""

import math

import timm
import torch
from torch import nn


def test_van_begins_as_convolutions_do():
    torch.manual_seed(0)
    model = timm.create_model("test_van", embed_dims=(32, 32, 64, 64))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith("head"):
            groups = getattr(layer, "groups", 1)
            fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel() // groups
            assert abs(layer.weight.std() / math.sqrt(2 / fan_out) - 1) < 0.2, name
            assert not layer.bias.any()
    assert abs(model.head.fc.weight.std() / 0.02 - 1) < 0.2
    assert all((value == 0.01).all() for name, value in model.named_parameters() if name.endswith("gamma"))


def test_van_images_are_normalised_as_timms_vit_did():
    cfg = timm.get_pretrained_cfg("van_b0")
    assert (cfg.mean, cfg.std, cfg.crop_pct) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9)
    assert cfg.hf_hub_filename == "van_tiny_754.pth.tar"
    assert timm.get_pretrained_cfg("vmamba_tiny").mean == timm.data.IMAGENET_DEFAULT_MEAN

"""Initial weights of L2ViT and NaLaFormer, and the windows of L2ViT's weights."""

import timm
import torch
from torch import nn

from visionmix.mixers import WindowAttention


def test_convolutions_begin_as_linear_layers_do():
    torch.manual_seed(0)
    for name in ("test_l2vit", "test_nalaformer"):
        model = timm.create_model(name, embed_dims=(32, 32, 64, 64))
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert any(layer.groups > 1 for layer in layers)
        for layer in layers:
            assert abs(layer.weight.std() / 0.02 - 1) < 0.25
            assert not layer.bias.any()


def test_windows_grow_with_the_images_of_the_weights():
    for name, side in (("l2vit_base.in22k_in1k", 7), ("l2vit_base.in22k_in1k_384", 12)):
        with torch.device("meta"):
            model = timm.create_model(name)
        windows = [module for module in model.modules() if isinstance(module, WindowAttention)]
        assert len(windows) == 12
        assert {(window.side, window.has_bias) for window in windows} == {(side, False)}
    cfg = timm.get_pretrained_cfg("l2vit_base.in22k_in1k_384")
    assert (cfg.input_size, cfg.crop_mode, cfg.crop_pct) == ((3, 384, 384), "squash", 1.0)


def test_scales_of_later_stages_begin_smaller():
    model = timm.create_model("test_nalaformer", layer_scale=(1.0, 1.0, 1e-6, None))
    for stage, expected in zip(model.stages, (1.0, 1.0, 1e-6, None), strict=True):
        for block in stage.blocks:
            for scale in (block.scale1, block.scale2):
                assert (scale.gamma == expected).all() if expected else not scale.has_gamma

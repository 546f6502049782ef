"""HER-Seg's encoder: its blocks, and files of the models that it is a part of."""

import golden
import timm
import torch
from torch.nn import functional as F

from visionmix.models import load_checkpoint

NAME = "her_encoder"


def test_it_is_convolutions_and_then_attention_of_ever_narrower_heads():
    with torch.device("meta"):
        model = timm.create_model(NAME)
    heads = [block.mixer.num_heads if hasattr(block, "mixer") else 0 for block in model.blocks]
    assert heads == [0] * 2 + [6] * 2 + [12] * 6 + [24] * 2
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"]) == ((3, 1024, 1024), 0)
    assert cfg["std"] == cfg["mean"]


def test_convolutions_add_nothing_at_first():
    torch.manual_seed(0)
    block = timm.create_model("test_her_encoder").eval().blocks[0]
    x = torch.randn(1, 5, 4, 16)
    assert torch.equal(block(x), F.gelu(x))


def test_files_of_the_pre_training_and_of_segmentation_models_load():
    encoder = golden.state_dict(golden.load(f"{NAME}__48x48")[0])
    expected = timm.create_model(NAME)
    load_checkpoint(expected, encoder, name=NAME)
    around = {"neck.0.weight": torch.zeros(1), "mask_decoder.iou_token.weight": torch.zeros(1)}
    model = timm.create_model(NAME)
    load_checkpoint(model, {f"image_encoder.{key}": value for key, value in encoder.items()} | around, name=NAME)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)

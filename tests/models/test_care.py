"""CARE's two classifiers, and its last block."""

import pytest
import timm
import torch
from timm.layers import DropPath


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("test_care", num_classes=5).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_mean_of_two_classifiers(model):
    head, features = model.head, model.forward_features(IMAGES)
    assert features.shape == (2, 3, 3, 64)
    own, taught = model.get_classifier()
    wide = torch.nn.functional.gelu(head.proj(features)).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.gelu(head.conv(wide).mean(dim=(2, 3)))
    logits = (own(head.norm(pooled)) + taught(head.dist_norm(pooled))) / 2
    assert torch.allclose(model(IMAGES), logits, atol=1e-5)


def test_distilled_training_gives_both(model):
    model.set_distilled_training()
    assert model(IMAGES).shape == (2, 5)
    own, taught = model.train()(IMAGES)
    assert own.shape == taught.shape == (2, 5)
    assert not torch.allclose(own, taught)
    assert torch.jit.script(model)(IMAGES).shape == (2, 5)
    model.set_distilled_training(False)
    assert model(IMAGES).shape == (2, 5)


def test_new_classifiers_are_two(model):
    model.reset_classifier(3)
    assert [layer.out_features for layer in model.get_classifier()] == [3, 3]
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, model.head_hidden_size) == (2, 128)
    with pytest.raises(ValueError, match="global_pool='catavgmax' is too wide"):
        model.reset_classifier(3, "catavgmax")


def test_the_last_block_has_no_sum_and_drops_whole_images():
    model = timm.create_model("test_care", drop_path_rate=0.25)
    assert [hasattr(block, "scale") for stage in model.stages for block in stage.blocks] == [True] * 4 + [False]
    assert isinstance(model.head.drop_path, DropPath)
    assert model.head.drop_path.drop_prob == 0.25
    assert all((block.scale.gamma == 1e-6).all() for block in model.stages[1].blocks)

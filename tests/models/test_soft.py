"""SOFT's class token, its dropout, and SOFT++'s published step."""

import pytest
import timm
import torch
from torch import nn

from visionmix.mixers import SoftmaxFreeAttention


def test_class_token_meets_the_last_map_alone():
    model = timm.create_model("test_softpp").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (2, 1 + 2 * 3, 64)
        last, maps = model.forward_intermediates(images)
        assert torch.equal(last, features)
        pairs = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True)
        assert [prefix.shape[1] for _, prefix in pairs] == [0, 0, 0, 1]
        model.class_token.weight.add_(1.0)
        changed = model.forward_intermediates(images, intermediates_only=True)
    assert [torch.equal(*each) for each in zip(maps, changed, strict=True)] == [True, True, True, False]


def test_drop_path_drops_elements_before_the_last_stage_and_branches_in_it():
    model = timm.create_model("test_soft", drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    drops = [block.scale2.drop_path for block in blocks]
    assert [type(drop) is nn.Dropout for drop in drops] == [True, True, True, True, False]
    assert [drop.p for drop in drops[:-1]] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drops[-1].drop_prob == pytest.approx(0.4)


def test_published_step_is_that_of_all_mixers():
    model = timm.create_model("test_softpp", published_step=True)
    mixers = [each for each in model.modules() if isinstance(each, SoftmaxFreeAttention)]
    assert [each.published_step for each in mixers] == [True] * 4
    with pytest.raises(ValueError, match=r"published_step=True is a step of SOFT\+\+ alone"):
        timm.create_model("test_soft", published_step=True)

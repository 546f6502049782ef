"""DynamicViT as models: what they prune, where they begin, and what they are taught by."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2

from visionmix import reduction

DEIT = {"img_size": 96, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def model(**options):
    torch.manual_seed(0)
    return timm.create_model("test_dynamicvit", num_classes=5, **options).eval()


def images(batch=2):
    return torch.randn(batch, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_the_rate_says_how_many_tokens_stay():
    assert model().forward_features(images()).shape[1] == 1 + int(0.6**3 * 36)
    assert model(keep_rate=0.5).forward_features(images()).shape[1] == 1 + int(0.5**3 * 36)
    assert model(keep_rate=[0.9, 0.2], layers=[0, 2]).forward_features(images()).shape[1] == 1 + int(0.2 * 36)


def test_training_begins_from_a_deit():
    """Which has no predictors."""
    torch.manual_seed(2)
    deit = VisionTransformer(**DEIT).eval()
    overlay = {"state_dict": deit.state_dict(), "num_classes": 5}
    made = model(pretrained=True, pretrained_cfg_overlay=overlay, keep_rate=1.0)
    torch.testing.assert_close(made(images()), deit(images()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reduction.remove(made)(images()), deit(images()), atol=1e-5, rtol=1e-5)


def test_is_copied_and_pickled():
    made = model()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is type(made)
        assert torch.equal(other(images()), made(images()))
        assert reduction.remove(other).norm.weight is other.norm.weight is not made.norm.weight


def test_a_teacher_is_fetched_by_name_at_the_first_step(monkeypatch):
    torch.manual_seed(2)
    deit = VisionTransformer(**DEIT)
    made = model(teacher="deit_tiny_patch16_224").train()
    fetched = []
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: fetched.append((name, pretrained)) or deit)
    for _ in range(2):
        logits, losses = made.forward_train(images())
    assert fetched == [("deit_tiny_patch16_224", True)]
    assert logits.shape == (2, 5)
    assert losses.keys() == {"ratio", "logits", "tokens"}
    assert all(value.isfinite() and value > 0 for value in losses.values())
    assert not deit.training
    assert not any(value.requires_grad for value in deit.parameters())
    assert not any("teacher" in key or "fetched" in key for key in made.state_dict())


def test_an_image_that_drops_all_its_tokens_trains():
    made = model().train()
    for predictor in made.reduction.predictors:
        predictor.fc3.bias.data = torch.tensor([-1000.0, 1000.0])
    logits, losses = made.forward_train(images())
    (logits.sum() + losses["ratio"]).backward()
    assert losses["ratio"] > 0
    assert all(value.grad.isfinite().all() for value in made.parameters())


def test_a_teacher_that_timm_does_not_know_is_refused():
    with pytest.raises(ValueError, match="did you mean 'deit_tiny_patch16_224'"):
        model(teacher="deit_tiny_patch16_24")


def test_predictors_learn_faster_than_the_rest():
    """By the published factor, as the recipes set it."""
    made = model()
    rates = {"layer_decay": 0.01, "layer_decay_min_scale": 0.01}
    optimizer = create_optimizer_v2(made, "adamw", lr=1.0, **rates)
    names = {value: name for name, value in made.named_parameters()}
    for group in optimizer.param_groups:
        predicts = {names[value].startswith("reduction.predictors") for value in group["params"]}
        assert predicts == {group["lr_scale"] == 1.0}
        assert group["lr_scale"] in (1.0, 0.01)

"""EcoFormer's hashes are fitted by an explicit call, layer after layer, and are part of the model's state."""

from functools import partialmethod

import pytest
import timm
import torch

from visionmix.mixers import KernelHashAttention
from visionmix.mixers.kernel_hash import KernelHash


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    """Few steps of gradient descent a bit; tests/mixers/test_kernel_hash.py makes all."""
    monkeypatch.setattr(KernelHash, "fit", partialmethod(KernelHash.fit, steps=3))


def hashes(model):
    return [each.hash for each in model.modules() if isinstance(each, KernelHashAttention)]


def test_calibration_fits_every_hash_to_what_it_is_given():
    torch.manual_seed(0)
    model = timm.create_model("test_ecoformer").train()
    images = torch.randn(2, 3, 64, 96)
    model.stages[0].eval()
    before = [each.anchors.clone() for each in hashes(model)]
    model.calibrate(images)
    assert len(before) == 4
    for old, each in zip(before, hashes(model), strict=True):
        assert not torch.equal(old, each.anchors)
    assert model.training
    assert not model.stages[0].training
    assert all(value.grad is None for value in model.parameters())
    # Of the third stage's second block: anchors are among what the fitted model gives it.
    seen = []
    mixer = model.stages[2].blocks[1].mixer
    handle = mixer.hash.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    cells = seen[0].transpose(0, 1).flatten(1, 2)
    assert torch.cdist(mixer.hash.anchors, cells).amin(dim=2).max() < 1e-3


def test_no_pass_changes_a_hash_and_a_state_dict_carries_it():
    torch.manual_seed(0)
    model, images = timm.create_model("test_ecoformer"), torch.randn(2, 3, 64, 64)
    model.calibrate(images)
    state = {key: value.clone() for key, value in model.state_dict().items() if ".hash." in key}
    model(images).sum().backward()
    with torch.no_grad():
        model.eval()(images)
    assert len(state) == 12
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    other = timm.create_model("test_ecoformer").eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), model(images))


def test_models_without_fitted_layers_refuse_calibration():
    with pytest.raises(ValueError, match="no layer of Hierarchical is fitted to data"):
        timm.create_model("test_vmamba").calibrate(torch.randn(1, 3, 64, 64))

"""Hooks that a model offers: schedules told from outside, and norms folded for inference."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from tiny_models import WHOLE
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from visionmix.layers import BatchNorm, LinearNorm, RepBN
from visionmix.layers.fold import ChannelAffine


class Calls(TorchDispatchMode):
    """Counts the operations that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def operations(model, images):
    with torch.no_grad(), Calls() as calls:
        model(images)
    return calls.count


def drawn(name, **options):
    """Return a model in float64 and eval mode, with batch norms that do something and biases that are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).double().eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
        if isinstance(module, RepBN):
            nn.init.normal_(module.alpha, std=0.5)
        if isinstance(module, _BatchNorm | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.5)
    return model


def size(model):
    return sum(value.numel() for value in model.parameters())


@WHOLE
def test_reparameterised_models_compute_the_same(name):
    model = drawn(name)
    again = copy.deepcopy(model)
    again.reparameterize()
    again.reparameterize()
    norms = sum(isinstance(module, BatchNorm | LinearNorm) for module in model.modules())
    folded = reparameterize_model(model)
    # A model with nothing to fold is computed once: its copies are to work.
    kept = [type(each) for each in folded.modules()] == [type(each) for each in model.modules()]
    shapes = ((1, 3, 43, 78), (2, 3, 64, 64))  # maps that windows and patches do not cover, too
    for shape in shapes[: 1 if kept else 2]:
        images = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected, maps = model(images), model.forward_intermediates(images, norm=True, intermediates_only=True)
            assert torch.allclose(folded(images), expected, rtol=1e-9, atol=1e-9)
            others = folded.forward_intermediates(images, norm=True, intermediates_only=True)
            assert all(torch.allclose(*pair, rtol=1e-9, atol=1e-9) for pair in zip(others, maps, strict=True))
    assert not any(isinstance(module, BatchNorm | LinearNorm) for module in folded.modules())
    assert size(folded) <= size(model)
    if norms:
        assert size(folded) < size(model)
        assert operations(folded, images) < operations(model, images)
    assert again.state_dict().keys() == folded.state_dict().keys()
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), folded.parameters(), strict=True))


SLAB = [f"test_{name}" for name in ("slab_swin", "slab_cswin", "slab_pvt", "slab_deit", "swin_prepbn", "pvt_prepbn")]


@pytest.mark.parametrize("name", SLAB)
def test_reparameterised_in_float32(name):
    model = drawn(name).float()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)
        assert (reparameterize_model(model)(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("test_slab_swin", ["stages.2.blocks.0.norm1", "stages.2.blocks.1.norm1", "stages.3.blocks.0.norm1", "norm"]),
        ("test_slab_cswin", ["stages.2.blocks.0.norm1", "stages.3.blocks.0.norm1", "norm"]),
        ("test_slab_pvt", []),
        ("test_pvt_prepbn", [f"stages.{stage}.blocks.0.norm1" for stage in range(3)]),  # queries and squares read them
        ("test_slab_deit", ["norm"]),
    ],
)
def test_norms_that_one_linear_layer_reads_unpadded_are_folded_away(name, left):
    folded = drawn_and_folded(name)
    assert [key for key, module in folded.named_modules() if type(module) is ChannelAffine] == left


def drawn_and_folded(name):
    return reparameterize_model(drawn(name))


@pytest.mark.parametrize("skeleton", ["test_pyramid", "test_plain"])
@pytest.mark.parametrize("norm", ["batchnorm", "rep_bn", {"name": "linear_norm", "share": 0.5}], ids=str)
@pytest.mark.parametrize("prefix", [None, "middle"])
def test_any_model_takes_norms_that_fold(skeleton, norm, prefix):
    options = {"norm_layer": norm, "mixer": "softmax"}
    if prefix and skeleton == "test_pyramid":
        pytest.skip("only plain models have prefix tokens")
    if prefix:
        options |= {"prefix_tokens": prefix, "global_pool": "token"}
    model = drawn(skeleton, **options)
    images = torch.randn(2, 3, 80, 96, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(reparameterize_model(model)(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["test_slab_swin", "test_swin_prepbn"])
def test_folded_models_script_and_trace(name):
    folded = drawn_and_folded(name)
    images = torch.randn(1, 3, 75, 110, dtype=torch.float64)
    with torch.no_grad():
        expected = folded(images)
        assert torch.allclose(torch.jit.script(folded)(images), expected)
        assert torch.allclose(torch.fx.symbolic_trace(folded)(images), expected)


def lambdas(model):
    return {round(module.layer_norm_part.item(), 6) for module in model.modules() if isinstance(module, LinearNorm)}


@pytest.mark.parametrize(("done", "part"), [(0, 1.0), (0.04, 0.75), (0.08, 0.5), (0.16, 0.0), (1, 0.0)])
def test_every_scheduled_layer_is_told(done, part):
    model = timm.create_model("test_slab_swin")
    assert lambdas(model) == {0.0}
    model.set_progress(done)
    assert lambdas(model) == {part}
    assert lambdas(copy.deepcopy(model)) == lambdas(ModelEmaV3(model).module) == {part}
    model(torch.randn(2, 3, 96, 96)).square().mean().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert lambdas(model) == {part}  # a pass counts nothing


def test_the_schedule_changes_training_alone():
    model, images = timm.create_model("test_slab_swin"), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        outputs = []
        for done in (0, 1):
            model.eval().set_progress(done)
            outputs.append(model(images))
        assert torch.equal(*outputs)
        outputs = []
        for done in (0, 0.08, 1):
            model.train().set_progress(done)
            outputs.append(model(images))
        assert not torch.allclose(outputs[0], outputs[1])
        assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("done", [-0.1, 1.01, float("nan"), 60000])
@pytest.mark.parametrize("name", ["test_slab_swin", "test_vig"])
def test_what_is_no_share_is_refused(name, done):
    model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"done={done}"):
        model.set_progress(done)


def test_models_without_a_schedule_are_told_in_vain():
    model = timm.create_model("test_vig")
    before = copy.deepcopy(model.state_dict())
    model.set_progress(0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("host", ["swin", "cswin"])
def test_a_host_takes_its_norm_to_all_places(host):
    from visionmix.models import hosts
    from visionmix.models.hosts import cswin, swin

    make = {"swin": swin.swin, "cswin": cswin.cswin}[host]
    layout = make(16, (1, 1, 2, 1), 2, "LLSS", lambda stage: "simplified")
    layout = hosts.with_norm(layout, partial(RmsNorm, eps=1e-3))
    norms = [module for module in layout.skeleton(**layout.options).modules() if "Norm" in type(module).__name__]
    assert len(norms) == 1 + 3 + 2 * 5 + 1
    assert all(type(module) is RmsNorm and module.eps == 1e-3 for module in norms)


@pytest.mark.parametrize("name", ["test_slab_swin", "test_flatten_swin", "test_agent_cswin", "test_flatten_cswin"])
def test_stages_of_one_kind_take_any_depth(name):
    model = timm.create_model(name, depths=(2, 1, 3, 2))
    assert [len(stage.blocks) for stage in model.stages] == [2, 1, 3, 2]
    mixers = [block.mixer for block in model.stages[2].blocks]
    assert len({type(mixer) for mixer in mixers}) == 1
    if "cswin" not in name:
        assert [mixer.shift for mixer in mixers] == [False, True, False]

"""The model contract of timm: a pass and a graph of every tiny model, the whole contract of those that are core."""

import copy
import functools
import math

import pytest
import timm
import torch
from tiny_models import EVERY, WHOLE
from torch.fx import GraphModule, Tracer, symbolic_trace

from visionmix.layers import split_prefix


def made(name):
    torch.manual_seed(0)
    return timm.create_model(name).eval()


shared = functools.cache(made)


@pytest.fixture
def model(name):
    """The model that the tests share, which they leave as it is."""
    return shared(name)


@pytest.fixture
def own(name):
    """A model that the test may change."""
    return made(name)


def model_prefix(model):
    """Return how many tokens of `model` are no cells: none, where its features are maps."""
    return getattr(model, "num_prefix_tokens", 0) if model.output_fmt == "NLC" else 0


def classifiers(model):
    """Return the last linear layers of `model`: one, or two of a distilled model."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def keeps_all_tokens(model):
    """Return whether the features of `model` have a value for each cell: a model that prunes has fewer."""
    return not hasattr(model, "reduction")


def image(height=96, width=96, batch=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


@EVERY
def test_one_pass_and_one_graph_by_fx(name, model):
    graph = Tracer().trace(model)
    graph.owning_module = model
    graph.eliminate_dead_code()  # as feature extractors do: a result that nothing reads is not computed
    traced = GraphModule(model, graph)
    with torch.no_grad():
        logits = model(image(96, 64, batch=2))
        assert torch.equal(traced(image(96, 64, batch=2)), logits)
        assert torch.equal(traced(image(64, 160)), model(image(64, 160)))
    assert logits.shape == (2, 1000)
    assert torch.isfinite(logits).all()


@WHOLE
@pytest.mark.parametrize("size", [(96, 96), (225, 193), (32, 64)])
def test_forward_at_any_size(name, model, size):
    images = image(*size, batch=3)
    with torch.no_grad():
        logits, last = model(images), model(images[-1:])
    assert (logits.shape, last.shape) == ((3, 1000), (1, 1000))
    assert torch.isfinite(logits).all()
    assert torch.allclose(logits[-1:], last, atol=1e-5)


@WHOLE
def test_features_and_heads(name, own):
    model = own
    images = image()
    features = model.forward_features(images)
    rows, columns = model.default_cfg["pool_size"]
    shape = {"NHWC": (rows, columns), "NLC": (model_prefix(model) + rows * columns,)}[model.output_fmt]
    if keeps_all_tokens(model):
        assert features.shape == (1, *shape, model.num_features)
    else:
        assert model_prefix(model) < features.shape[1] < shape[0]
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (1, model.head_hidden_size)
    if len(classifiers(model)) == 1:  # two have norms of their own before them
        assert torch.allclose(model.forward_head(features), model.get_classifier()(before))
    model.reset_classifier(0)
    assert torch.allclose(model(images), before)
    model.reset_classifier(0, "")
    unpooled = (*features.shape[:-1], model.head_hidden_size)  # now: a pooling may join several tokens
    assert model(images).shape == unpooled
    model.reset_classifier(5, "avg")
    assert model(images).shape == (1, 5)
    assert timm.create_model(name, num_classes=0, global_pool="").eval()(images).shape == unpooled


@WHOLE
def test_cfg_names_layers_that_exist(name, model):
    for names in (model.default_cfg["first_conv"], model.default_cfg["classifier"]):
        for layer in (names,) if isinstance(names, str) else names:
            assert f"{layer}.weight" in model.state_dict()


@WHOLE
def test_every_parameter_gets_a_gradient(name):
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1).train()
    model(image(128, 128, batch=2)).mean().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


@WHOLE
def test_gradient_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each in (model, other):
        torch.manual_seed(1)  # a model that prunes draws what it drops
        each(image()).square().sum().backward()
    for (key, value), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(value.grad, theirs.grad, rtol=1e-4, atol=1e-5), key


@WHOLE
def test_gradients_repeat_bitwise(name):
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    grads = []
    for _ in range(2):
        torch.manual_seed(1)
        model.zero_grad()
        model(image(batch=2)).square().sum().backward()
        grads.append([value.grad.clone() for value in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@WHOLE
def test_intermediates(name, model):
    images = image(96, 128)
    final, maps = model.forward_intermediates(images)
    assert torch.allclose(final, model.forward_features(images))
    assert len(maps) == len(model.feature_info) >= 3
    for info, each in zip(model.feature_info, maps, strict=True):
        assert each.shape[:2] == (1, info["num_chs"])
        for side, pixels in zip(each.shape[2:], (96, 128), strict=True):
            assert side <= math.ceil(pixels / info["reduction"]) + 1
    last = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)[0]
    if model_prefix(model):
        cells, prefix = split_prefix(final, model.class_token.positions(final.shape[1] - model_prefix(model)))
        pair = model.forward_intermediates(images, 1, norm=True, intermediates_only=True, return_prefix_tokens=True)[0]
        assert torch.allclose(pair[1], prefix)
        final = cells.unflatten(1, last.shape[1:3]) if keeps_all_tokens(model) else last
    if hasattr(model, "neck"):  # which makes the features of all maps
        assert torch.allclose(model.neck([each.permute(0, 2, 3, 1) for each in maps]), final)
        final = maps[-1].permute(0, 2, 3, 1)
    assert torch.allclose(last, final)
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(early[0], maps[0])
    tokens = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(tokens, maps[-1].flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="output_fmt='NCL'"):
        model.forward_intermediates(images, output_fmt="NCL")


@WHOLE
def test_intermediate_layers_as_vision_transformers_have_them(name, model):
    if not hasattr(model, "get_intermediate_layers"):
        pytest.skip("only plain models have one width for all blocks")
    maps = model.forward_intermediates(image(), indices=2, norm=True, intermediates_only=True)
    layers = model.get_intermediate_layers(image(), n=2, norm=True)
    assert all(torch.equal(a, b.flatten(2).transpose(1, 2)) for a, b in zip(layers, maps, strict=True))
    first, prefix = model.get_intermediate_layers(image(), n=[0], reshape=True, return_prefix_tokens=True)[0]
    assert torch.equal(first, model.forward_intermediates(image(), indices=[0], intermediates_only=True)[0])
    assert prefix.shape == (1, model.num_prefix_tokens, model.num_features)


@WHOLE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_new_classifier_has_the_models_type_and_device(name, dtype):
    model = timm.create_model(name, num_classes=0).to(dtype)
    model.reset_classifier(7)
    assert {layer.weight.dtype for layer in classifiers(model)} == {dtype}
    assert model(image().to(dtype)).shape == (1, 7)
    model = timm.create_model(name, device="meta", dtype=dtype)
    model.reset_classifier(0)
    model.reset_classifier(7, "avg")
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", dtype)}


@EVERY
def test_without_a_classifier_the_result_has_num_features(name):
    model = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        assert model(image(64, 32)).shape == (1, model.num_features)


@WHOLE
def test_features_only(name, model):
    features = timm.create_model(name, features_only=True, out_indices=(0, 1))
    features.model.load_state_dict(model.state_dict(), strict=False)
    maps = features.eval()(image(96, 128))
    assert [each.shape[1] for each in maps] == features.feature_info.channels()
    expected = model.forward_intermediates(image(96, 128), indices=[0, 1], intermediates_only=True)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(maps, expected, strict=True))


@WHOLE
def test_pruning_drops_what_follows(name, own):
    model = own
    params = sum(value.numel() for value in model.parameters())
    expected = model.forward_intermediates(image(), indices=[0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert not list(model.head.parameters())
    assert sum(value.numel() for value in model.parameters()) < params
    assert torch.equal(model.forward_intermediates(image(), indices=[0], intermediates_only=True)[0], expected)


@WHOLE
def test_scripted(name, model):
    scripted = torch.jit.script(model)
    with torch.no_grad():  # whose graphs are not compiled for gradients, which takes as long as scripting
        for size in ((96, 96), (64, 160)):
            assert torch.allclose(scripted(image(*size)), model(image(*size)), atol=1e-6)


@EVERY
@pytest.mark.long
def test_traced_by_fx_and_scripted(name, model):
    scripted = torch.jit.script(symbolic_trace(model))
    assert torch.allclose(scripted(image()), model(image()), atol=1e-6)


@WHOLE
def test_layer_groups_and_weight_decay(name, model):
    from timm.models import group_parameters
    from timm.optim import create_optimizer_v2

    names = dict(model.named_parameters())
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert {key for group in groups.values() for key in group} == names.keys()
    assert model.no_weight_decay() <= names.keys()
    optimizer = create_optimizer_v2(model, opt="adamw", layer_decay=0.8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@WHOLE
def test_bfloat16_autocast(name, model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(image())
    exact = model(image())
    assert torch.isfinite(low).all()
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()


@WHOLE
def test_device_and_dtype(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.bfloat16)}


@WHOLE
@pytest.mark.parametrize(("shape", "message"), [
    ((1, 1, 96, 96), r"1 channels.*in_chans=3"),
    ((3, 96, 96), r"x\[None\]"),
    ((1, 3, 3, 96), "at least"),
    ((96,), "four axes"),
])  # fmt: skip
def test_what_is_no_batch_of_images_is_refused(name, model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(torch.zeros(shape))

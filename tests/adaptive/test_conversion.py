"""Converted models: which layers, what stays, what is refused, and the converted model as a model."""

import copy
import itertools
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visionmix import adaptive, reduction

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PLAIN = {**SMALL, "mixer": "softmax", "mlp_layer": "mlp"}


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL | options).eval()


def spread(model: nn.Module) -> nn.Module:
    """Return `model` with gates that choose all their choices."""
    torch.manual_seed(1)
    for module in adaptive.modules(model).values():
        nn.init.normal_(module.gating_network.fc.weight)
    return model


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_every_layer_named_becomes_one_and_the_rest_stays():
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = adaptive.convert(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(adaptive.modules(new)) == {
        f"blocks.{block}.{name}"
        for block in range(2)
        for name in ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp")
    }
    for name, value in new.state_dict().items():
        if name in before:
            assert torch.equal(value, before[name])
    mlp, proj = new.blocks[0].mlp, new.blocks[0].attn.proj
    assert (mlp.learner_dim, mlp.num_learners, mlp.gating_network.min_choice) == (32, 4, 0)
    assert isinstance(mlp.act, nn.GELU)
    assert (proj.learner_dim, proj.gating_network.min_choice) == (round((32**2 + 32) / 65 / 4), 1)
    assert isinstance(proj.act, nn.Identity)
    assert new(images()).shape == (3, 5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"act_layer": nn.ReLU, "reg_tokens": 2, "qk_norm": True, "init_values": 1.0}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU}),
        ("plain_tiny", {"mixer": "softmax", "mlp_layer": "mlp"}),
        ("plain_tiny", {"mixer": "softmax", "mlp_layer": "mlp", "prefix_tokens": "first"}),
        ("plain_tiny", {"mixer": {"name": "softmax", "rotary": True, "lepe": 3}, "mlp_layer": "swiglu"}),
        ("swin_tiny_patch4_window7_224", {"window_size": 4, "patch_size": 2}),
    ],
)
def test_models_of_both_libraries(name, options):
    sizes = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)} if name.startswith("swin") else {}
    torch.manual_seed(0)
    shape = {key: value for key, value in SMALL.items() if key not in ("depth", "num_heads") or not sizes}
    model = timm.create_model(name, **shape | sizes | options).eval()
    new = spread(adaptive.convert(model))
    x = images()
    out = new(x)
    assert out.shape == model(x).shape
    for module in adaptive.modules(new).values():
        module.record = []
    assert_close(new(x[1:2]), out[1:2])
    new.train()(x)
    for module in adaptive.modules(new).values():
        assert [gate.shape[-1] for gate in module.record] == [5, 5]
        assert_close(module.record[1].sum(-1), torch.ones_like(module.record[1][..., 0]))


def test_a_full_module_costs_what_its_layer_does():
    model = vit()
    with FlopCounterMode(display=False) as plain:
        model(images())
    for cost in (1.0, 0.5):
        new = adaptive.convert(model, cost=cost)
        adaptive.set_learners(new, 1.0)
        with FlopCounterMode(display=False) as full:
            new(images())
        with FlopCounterMode(display=False) as none:
            adaptive.set_learners(new, 0)
            new(images())
        linear = plain.get_total_flops() - none.get_total_flops()
        assert full.get_total_flops() - none.get_total_flops() == pytest.approx(cost * linear, rel=0.06)


def test_learners_taken_from_weights_are_the_layers_together():
    model = vit(depth=1).double()
    new = adaptive.convert(model, layers=["blocks.*.mlp"], init="weights", out_bias=True)
    adaptive.set_learners(new, 4)
    x = torch.randn(7, 32, dtype=torch.float64)
    assert_close(new.blocks[0].mlp(x), model.blocks[0].mlp(x))
    assert_close(new(images().double()), model(images().double()))
    new = adaptive.convert(model, layers=["*.qkv", "*.attn.proj"], init="weights", out_bias=True, cost=2.0 * 65 / 66)
    adaptive.set_learners(new, 4)
    assert_close(new(images().double()), model(images().double()), factor=10)
    errors = []
    for count in range(5):
        error = new.blocks[0].attn.proj.first(x, count) - model.blocks[0].attn.proj(x)
        errors.append(error.norm().item())
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_state_dicts_and_files_go_round(tmp_path):
    new = spread(adaptive.convert(vit(), gate_dims=()))
    save_file(new.state_dict(), tmp_path / "acm.safetensors")
    other = adaptive.convert(vit(), gate_dims=())
    assert not torch.equal(other(images()), new(images()))
    other.load_state_dict(load_file(tmp_path / "acm.safetensors"))
    assert torch.equal(other(images()), new(images()))
    for copied in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(copied(images()), new(images()))


def test_set_learners():
    new = spread(adaptive.convert(vit()))
    gated = new(images())
    adaptive.set_learners(new, 0.5)
    assert {module.learners for module in adaptive.modules(new).values()} == {2}
    half = new(images())
    adaptive.set_learners(new, 2)
    assert torch.equal(new(images()), half)
    adaptive.set_learners(new, None)
    assert torch.equal(new(images()), gated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    new = spread(adaptive.convert(vit()))
    half = copy.deepcopy(new).to(dtype)
    assert half(images().to(dtype)).dtype == dtype
    converted = adaptive.convert(vit().to(dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_export_and_trace_hold_the_masked_form():
    new = spread(adaptive.convert(vit()))
    x, expected = images(2), new(images(2))
    exported = torch.export.export(new, (x,)).module()
    assert_close(exported(x), expected)
    traced = torch.jit.trace(new, (x,), check_trace=False)
    other = torch.randn_like(x)
    assert_close(exported(other), new(other))
    assert_close(traced(other), new(other))


def test_a_converted_model_can_be_reduced():
    new = spread(adaptive.convert(vit()))
    assert reduction.apply(new, "tome", r=2)(images()).shape == (3, 5)


def test_features_and_other_sizes():
    new = spread(adaptive.convert(vit(dynamic_img_size=True)))
    maps = new.forward_intermediates(images(), intermediates_only=True)
    assert [tuple(x.shape) for x in maps] == [(3, 32, 4, 4)] * 2
    assert new(torch.randn(1, 3, 48, 40)).shape == (1, 5)


def gated() -> nn.Module:
    return timm.create_model("plain_tiny", **SMALL, mixer={"name": "softmax", "gate": True}, mlp_layer="mlp")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adaptive.convert(adaptive.convert(vit())), ValueError, "converted already"),
        (lambda: adaptive.convert(vit(), 0), ValueError, "num_learners=0"),
        (lambda: adaptive.convert(vit(), 2.5), TypeError, "num_learners=2.5"),
        (lambda: adaptive.convert(vit(), cost=0), ValueError, "cost=0"),
        (lambda: adaptive.convert(vit(), init="svd"), ValueError, "init='svd': give 'random' or 'weights'"),
        (lambda: adaptive.convert(vit(), init="weights"), ValueError, "out_bias=True"),
        (lambda: adaptive.convert(vit(), init="weights", out_bias=True, cost=1.5), ValueError, "smaller cost"),
        (lambda: adaptive.convert(vit(), layers="blocks.0.mlp"), TypeError, "give a list of names"),
        (lambda: adaptive.convert(vit(), layers=["*.mpl"]), ValueError, r"'\*\.mpl' finds no layer"),
        (
            lambda: adaptive.convert(vit(), layers=["*.norm1"]),
            TypeError,
            r"blocks\.0\.norm1, a LayerNorm, can be no ACM",
        ),
        (lambda: adaptive.convert(vit(), layers=["*.mlp", "*.fc1"]), ValueError, "lies in blocks.0.mlp"),
        (lambda: adaptive.convert(vit(), learner_dim=3), ValueError, "learner_dim=3 follows from the layer"),
        (lambda: adaptive.convert(vit(), min_learners=5), ValueError, "min_learners=5"),
        (lambda: adaptive.convert(gated()), TypeError, "gated input"),
        (lambda: adaptive.convert(timm.create_model("pvt_v2_b0")), (ValueError, TypeError), "layers"),
        (lambda: adaptive.modules(vit()), ValueError, "has no ACM"),
        (lambda: adaptive.set_learners(adaptive.convert(vit()), 5), ValueError, "learners=5: give 0 to 4"),
        (lambda: adaptive.set_learners(adaptive.convert(vit()), 1.5), ValueError, "learners=1.5: give a share"),
        (lambda: adaptive.set_learners(adaptive.convert(vit()), "2"), TypeError, "learners='2'"),
    ],
)
def test_mistakes_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_gated_attention_without_its_last_projection():
    new = adaptive.convert(gated(), layers=["*.mlp", "*.qkv"]).eval()
    assert set(dict(new.blocks[0].mixer.qkv.named_children())) == {"q", "k", "v", "gate"}
    assert new(images()).shape == (3, 5)

"""timm's switches for fused attention and fast norms reach every layer that they name."""

import pytest
import timm
import torch
from timm.layers import LayerNorm, RmsNorm, set_fast_norm, set_fused_attn
from tiny_models import EACH_MIXER
from torch import nn
from torch.overrides import TorchFunctionMode

import visionmix

SOFTMAX = ["agent", "cross_window", "softmax", "window"]


@pytest.fixture
def unfused():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.fixture
def fast_norm():
    set_fast_norm(True)
    yield
    set_fast_norm(False)


class FusedCalls(TorchFunctionMode):
    """Counts calls of PyTorch's fused attention."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def build(name):
    torch.manual_seed(0)
    options = {"rotary": True, "lepe": 3} if name == "softmax" else {}
    return visionmix.create_mixer(name, 24, num_heads=2, **options).double()


@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("name", SOFTMAX)
def test_attention_without_the_fused_function(name, script, unfused):
    mixer, x = build(name), torch.randn(2, 9, 8, 24, dtype=torch.float64)
    set_fused_attn(True)
    fused = build(name)
    with FusedCalls() as calls:
        expected = fused(x)
    assert calls.count > 0
    with FusedCalls() as calls:
        out = mixer(x)  # what it was built with counts, as in timm
    assert calls.count == 0
    assert torch.allclose(out, expected, atol=1e-12)
    if script:
        assert torch.allclose(torch.jit.script(mixer)(x), expected, atol=1e-12)
        assert torch.allclose(torch.jit.script(fused)(x), expected, atol=1e-12)


@EACH_MIXER
def test_no_model_keeps_the_fused_function(name, unfused):
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 32, 64)
    with FusedCalls() as calls, torch.no_grad():
        logits = model(images)
    assert calls.count == 0
    set_fused_attn(True)
    other = timm.create_model(name).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(other(images), logits, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "test_plain",
        "test_agent_cswin",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("test_swin_prepbn", "test_stvit_r_swin")),
    ],
)
def test_exportable_models_do_not_call_the_fused_function(name):
    images = torch.randn(1, 3, 64, 96)
    for options, expected in (({"exportable": True}, False), ({"scriptable": True}, True)):
        model = timm.create_model(name, **options).eval()
        with torch.no_grad():
            with FusedCalls() as calls:
                logits = model(images)
            assert (calls.count > 0) is expected
            assert torch.allclose(torch.jit.script(model)(images), logits, atol=1e-5)


@EACH_MIXER
def test_fast_norms_are_everywhere(name, fast_norm):
    model = timm.create_model(name)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm | RmsNorm)]
    assert all(isinstance(norm, LayerNorm | RmsNorm) and norm._fast_norm for norm in norms)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.eval()(torch.randn(1, 3, 32, 64)).isfinite().all()

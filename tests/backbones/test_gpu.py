"""Every tiny model on a GPU against itself on the CPU: logits, gradients and half precision."""

import copy

import pytest
import timm
import torch
from accelerator import needs_gpu
from tiny_models import EVERY
from tolerance import assert_close, gradients

pytestmark = [needs_gpu, EVERY]


def both(name: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Return a model on the CPU in float64, its float32 copy on the GPU, and images for the former."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return copy.deepcopy(model).double(), model.cuda(), torch.randn(2, 3, 96, 128, dtype=torch.float64)


def test_logits_and_gradients_equal_the_cpus(name):
    exact, model, images = both(name)
    expected = exact(images)
    logits = model(images.float().cuda())
    assert_close(logits.cpu(), expected)
    # Gradients are sums over many tokens that partly cancel, so that they keep fewer digits.
    for (key, _), ours, theirs in zip(
        model.named_parameters(),
        gradients(logits, list(model.parameters())),
        gradients(expected, list(exact.parameters())),
        strict=True,
    ):
        assert_close(ours.cpu(), theirs, key, factor=100)


def test_gradients_repeat_bitwise(name):
    if name in ("test_agent_pvt", "test_agent_swin", "test_agent_cswin"):
        pytest.skip("PyTorch's memory-efficient attention sums up the gradients of its bias in any order")
    _, model, images = both(name)
    images = images.float().cuda()
    first, again = (gradients(model(images), list(model.parameters())) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(name, dtype):
    exact, model, images = both(name)
    with torch.no_grad():
        expected = exact(images)
        with torch.autocast("cuda", dtype):
            logits = model(images.float().cuda())
    assert (logits.cpu().double() - expected).abs().max() < 0.1 * expected.abs().max()

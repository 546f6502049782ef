"""The cheap kind of op: one PyTorch function, registered with PyTorch's own gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionmix.kernels.registration import register_reference_op


def leaky_sum(x: Tensor, decay: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`h_t = decay h_(t-1) + scale x_t` along axis 1."""
    state = torch.zeros_like(x[:, 0])
    out = []
    for t in range(x.shape[1]):
        state = decay * state + scale * x[:, t]
        out.append(state if bias is None else state + bias)
    return torch.stack(out, 1)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    schema = "(Tensor x, Tensor decay, float scale, Tensor? bias=None) -> Tensor"
    register_reference_op("test_leaky_sum", schema, leaky_sum, lambda x, *_: 3 * x.numel())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.1, 0.9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.visionmix.test_leaky_sum(x.sin(), self.decay, 0.5)


@pytest.mark.parametrize("bias", [False, True])
def test_reference_op_has_pytorchs_gradients(bias):
    x, decay = torch.randn(2, 5, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    tensors = [x.requires_grad_(), decay.requires_grad_()]
    tensors += [torch.randn(4, dtype=torch.float64, requires_grad=True)] if bias else []

    def op(x, decay, bias=None):
        return torch.ops.visionmix.test_leaky_sum(x, decay, 0.5, bias)

    assert torch.equal(op(*tensors), leaky_sum(x, decay, 0.5, tensors[2] if bias else None))
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)
    decay.requires_grad_(False)
    (grad,) = torch.autograd.grad(op(*tensors).sum(), [x])
    assert torch.equal(grad, torch.autograd.grad(leaky_sum(x, decay, 0.5, None).sum(), [x])[0])


def test_reference_op_in_graphs():
    model, x = Model(), torch.randn(2, 5, 4)
    expected = leaky_sum(x.sin(), model.decay, 0.5, None)
    expected_grad = torch.autograd.grad(expected.square().sum(), model.decay, retain_graph=True)[0]
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert "visionmix.test_leaky_sum.default" in [str(node.target) for node in program.graph.nodes]
    assert torch.equal(program.module()(x.repeat(3, 1, 1)), expected.repeat(3, 1, 1))
    for graph in (torch.jit.script(model), torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = graph(x)
        assert torch.equal(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), model.decay)[0], expected_grad)


def test_a_loop_over_a_symbolic_size_takes_a_fake():
    def fake(x: Tensor, decay: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        return torch.empty_like(x)

    schema = "(Tensor x, Tensor decay, float scale, Tensor? bias=None) -> Tensor"
    register_reference_op("test_leaky_sum_of_any_length", schema, leaky_sum, lambda x, *_: 3 * x.numel(), fake)

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.visionmix.test_leaky_sum_of_any_length(x, x[0, 0], 0.5)

    x = torch.randn(2, 5, 4)
    program = torch.export.export(Sum(), (x,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    longer = torch.randn(2, 9, 4)
    assert torch.equal(program.module()(longer), leaky_sum(longer, longer[0, 0], 0.5, None))


def test_a_reference_op_computes_without_autocast():
    x = torch.randn(2, 5, 4)

    def product(x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)

    register_reference_op("test_product", "(Tensor x) -> Tensor", product, lambda x: 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.ops.visionmix.test_product(x)
    assert torch.allclose(out, product(x), rtol=0, atol=1e-6)


def test_reference_op_counts_its_formula():
    x = torch.randn(2, 5, 4)
    with FlopCounterMode(display=False) as counter:
        torch.ops.visionmix.test_leaky_sum(x, torch.rand(4), 0.5)
    assert counter.get_total_flops() == 3 * x.numel()


def test_opcheck_of_a_reference_op():
    arguments = (torch.randn(2, 5, 4, requires_grad=True), torch.rand(4, requires_grad=True), 0.5, torch.rand(4))
    torch.library.opcheck(torch.ops.visionmix.test_leaky_sum, arguments)

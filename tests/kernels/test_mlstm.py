"""The matrix LSTM's cell against its definition, a step a token."""

import pytest
import torch
from tolerance import assert_close, assert_gradients_close, gradients
from torch.utils.flop_counter import FlopCounterMode

import visionmix
from visionmix.kernels import mlstm as op
from visionmix.kernels.mlstm import mlstm


def definition(q, k, v, input_gate, forget_gate):
    """The recurrence as the paper writes it, in float64."""
    q, k, v, gates, forget = (x.double() for x in (q, k, v, input_gate, forget_gate))
    k = k / q.shape[-1] ** 0.5
    matrix = normaliser = torch.zeros((), dtype=torch.float64)
    largest = torch.full_like(gates[:, 0], float("-inf"))
    outs = []
    for t in range(q.shape[1]):
        decay = torch.nn.functional.logsigmoid(forget[:, t])
        now = torch.maximum(decay + largest, gates[:, t])
        keep, add = (decay + largest - now).exp()[..., None], (gates[:, t] - now).exp()[..., None]
        matrix = keep[..., None] * matrix + add[..., None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        normaliser = keep * normaliser + add * k[:, t]
        total = (normaliser * q[:, t]).sum(-1).abs()
        read = (matrix * q[:, t, :, None, :]).sum(-1)
        outs.append(read / (torch.maximum(total, (-now).exp()) + 1e-6)[..., None])
        largest = now
    return torch.stack(outs, 1)


def arguments(length, heads=2, dim=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, heads, dim, generator=generator).to(dtype) for _ in range(3))
    # Gates of both signs and of some size: the stabiliser moves, and states are forgotten or outlive many tokens.
    gates, forget = (3 * torch.randn(2, length, heads, generator=generator).to(dtype) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v, gates, forget + 2)]


@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("length", [1, 3, 8, 13])
def test_chunks_are_the_recurrence(length, chunk, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK", chunk)
    inputs = [x.detach().double().requires_grad_() for x in arguments(length)]
    ours, expected = mlstm(*inputs), definition(*inputs)
    assert_close(ours, expected)
    assert_gradients_close(gradients(ours, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_is_computed_and_returned(dtype, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK", 8)
    inputs = arguments(29, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = mlstm(*inputs)
    assert ours.dtype == torch.float32
    assert_close(ours, definition(*inputs))
    assert all(x.isfinite().all() for x in gradients(ours, inputs))


def test_extreme_gates_stay_finite():
    q, k, v, gates, forget = arguments(9)
    inputs = [q, k, v, (100 * gates.detach()).requires_grad_(), (100 * forget.detach()).requires_grad_()]
    ours = mlstm(*inputs)
    assert_close(ours, definition(*inputs), factor=10)
    assert all(x.isfinite().all() for x in gradients(ours, inputs))


def test_strides_graphs_and_the_reference():
    q, k, v, gates, forget = (x.detach() for x in arguments(6))
    expected = mlstm(q, k, v, gates, forget)
    permuted = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, gates, forget)]
    assert torch.equal(mlstm(*permuted), expected)
    with visionmix.kernels.use("reference"):
        assert torch.equal(mlstm(q, k, v, gates, forget), expected)
    torch.library.opcheck(torch.ops.visionmix.mlstm, (q.requires_grad_(), k, v, gates, forget))


def test_flops_are_of_the_causal_half():
    inputs = [x.detach() for x in arguments(256)]
    with FlopCounterMode(display=False) as counter:
        mlstm(*inputs)
    assert counter.get_total_flops() == 2 * 2 * 256 * 257 // 2 * 4 * 5


def test_wrong_arguments_are_named():
    q, k, v, gates, forget = arguments(3)
    with pytest.raises(ValueError, match=r"forget_gate has shape \(2, 2, 2\).*length=3"):
        mlstm(q, k, v, gates, forget[:, 1:])
    with pytest.raises(TypeError, match="k is a int"):
        mlstm(q, 3, v, gates, forget)
    with pytest.raises(ValueError, match="v has shape"):
        mlstm(q, k, v[..., :2], gates, forget)

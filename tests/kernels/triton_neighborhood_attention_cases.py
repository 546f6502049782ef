"""Neighborhood attention in Triton's interpreter or on a GPU, against the float64 reference: outputs, every gradient.

Run by test_triton.py in a process of its own: TRITON_INTERPRET must be set before the kernels
are imported.
"""

import pytest
import torch
from accelerator import TRITON_DEVICE, needs_gpu
from neighborhoods import named_tensors
from quick_interpreter import spare_repeated_work
from tolerance import assert_close, assert_gradients_close, gradients

from visionmix.kernels import na1d, na2d, na3d, use
from visionmix.kernels.neighborhood_attention import neighborhood_attention_op, reference, triton_boxes

if TRITON_DEVICE == "cpu":
    spare_repeated_work()

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


SMALL = {"heads": 1, "key_heads": 1, "dim": 4, "value_dim": 5, "extra": 0, "bias": False, "batch": 1}


def make(grid, kernel_size, **sizes):
    """Return the tensor arguments by name, float64."""
    sizes = SMALL | sizes
    generator = torch.Generator().manual_seed(sum(grid) + sizes["dim"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(TRITON_DEVICE)

    kernel_size = (kernel_size,) * len(grid) if isinstance(kernel_size, int) else kernel_size
    return named_tensors(random, grid, kernel_size, **sizes)


def run(tensors, window, choice):
    """Return the output, the log-sum-exp and the gradients of every tensor."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    with use(choice):
        outs = FUNCTIONS[tensors["query"].dim() - 3](**leaves, **window, return_lse=True)
    return outs, gradients(outs, list(leaves.values()))


def check(tensors, dtype=torch.float32, **window):
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    outs, grads = run(tensors, window, "triton")
    assert outs[0].dtype == dtype
    assert outs[1].dtype == torch.float32
    expected, expected_grads = run({name: x.double() for name, x in tensors.items()}, window, "reference")
    assert_close(outs[0], expected[0], "output")
    assert_close(outs[1], expected[1], "log-sum-exp")
    assert_gradients_close(grads, expected_grads)


QUICK = [
    ((7, 9), {"kernel_size": 3}, {"bias": True}),
    ((7, 9), {"kernel_size": 5, "stride": 2}, {"heads": 2, "key_heads": 1}),
    ((7, 9), {"kernel_size": 3, "dilation": 2}, {"extra": 3, "bias": True}),
    ((7, 9), {"kernel_size": (3, 4), "stride": (1, 3), "is_causal": (False, True)}, {"bias": True}),
    ((7, 9), {"kernel_size": 5, "dilation": (1, 2), "circular": True}, {"extra": 1, "bias": True}),
    ((21,), {"kernel_size": 5, "stride": 3, "dilation": 2, "is_causal": True}, {"heads": 2, "extra": 2}),
    ((2, 3, 5), {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}, {"bias": True}),
]
LONG = [
    ((7, 9), {"kernel_size": 5, "stride": 5, "is_causal": True}, {"heads": 2, "bias": True}),
    ((7, 9), {"kernel_size": 5, "stride": 2}, {"heads": 4, "key_heads": 2, "bias": True}),
    ((7, 9), {"kernel_size": (7, 3), "circular": True, "is_causal": True}, {"bias": True}),
    ((15, 6), {"kernel_size": (7, 2), "stride": (4, 2), "dilation": (2, 3)}, {"batch": 2, "extra": 40}),
    ((19, 23), {"kernel_size": 3, "dilation": 5}, {"heads": 2, "batch": 2, "bias": True}),
    ((20, 18), {"kernel_size": (13, 7), "stride": (6, 3)}, {"bias": True}),
    ((333,), {"kernel_size": 63, "stride": 31}, {"bias": True}),
    ((128,), {"kernel_size": 8, "stride": 7, "dilation": 5}, {"heads": 4, "dim": 33}),
    ((1200,), {"kernel_size": 3}, {"extra": 2}),
    ((1,), {"kernel_size": 1}, {"bias": True, "extra": 1}),
    ((8, 8, 9), {"kernel_size": 3, "stride": (2, 1, 2), "dilation": (2, 2, 3)}, {"heads": 2}),
    ((5, 6, 7), {"kernel_size": (3, 5, 7), "circular": True}, {"bias": True}),
]


@pytest.mark.parametrize(
    ("grid", "window", "tensors"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_float32(grid, window, tensors):
    check(make(grid, window["kernel_size"], **tensors), **window)


@pytest.mark.long
@pytest.mark.parametrize(("grid", "window", "tensors"), QUICK)
def test_windows_whose_boxes_fit_no_block(grid, window, tensors, monkeypatch):
    monkeypatch.setattr(triton_boxes, "choose", lambda *_: None)
    check(make(grid, window["kernel_size"], **tensors), **window)


@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((85,), {"kernel_size": 7}),
        pytest.param((87,), {"kernel_size": 5, "stride": 4, "is_causal": True}, marks=pytest.mark.long),
        pytest.param((167,), {"kernel_size": 6, "stride": 2, "dilation": 2}, marks=pytest.mark.long),
        pytest.param((30, 29), {"kernel_size": 7}, marks=pytest.mark.long),
        pytest.param((31, 18), {"kernel_size": 5, "circular": True}, marks=pytest.mark.long),
        pytest.param((7, 8, 18), {"kernel_size": 3, "stride": (1, 2, 1)}, marks=pytest.mark.long),
    ],
)
def test_tiles_of_one_kind_share_a_table_and_programs_go_over_images(grid, window, monkeypatch):
    monkeypatch.setattr(triton_boxes, "_IMAGES", 2)
    check(make(grid, window["kernel_size"], batch=3, bias=True), **window)


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [
        (torch.bfloat16, 0),
        (torch.bfloat16, 2),
        pytest.param(torch.float16, 0, marks=pytest.mark.long),
        pytest.param(torch.float16, 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_half_precision(dtype, extra):
    tensors = make((4, 7), 3, heads=2, dim=8, value_dim=8, extra=extra, bias=not extra)
    check(tensors, dtype, kernel_size=3, dilation=(1, 2), stride=(2, 1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_reaches_the_queries_that_see_it(value):
    tensors = {name: x.float() for name, x in make((6, 9), 3).items()}
    tensors["key"][0, 0, 8] = value
    with use("triton"):
        out = na2d(**tensors, kernel_size=3)
    sees = torch.zeros(6, 9, dtype=torch.bool)
    sees[:2, 7:] = True
    assert torch.equal(out.isnan().all(-1)[0, :, :, 0].cpu(), sees)
    assert out[0, ~sees].isfinite().all()


@needs_gpu
@pytest.mark.skipif(TRITON_DEVICE == "cpu", reason="takes hours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((56, 56), {"kernel_size": 7}),
        ((56, 56), {"kernel_size": 7, "dilation": 8}),
        ((57, 55), {"kernel_size": 13, "stride": 4}),
        ((40, 40), {"kernel_size": 15, "circular": True}),
    ],
)
def test_maps_of_models(grid, window, dtype):
    check(
        make(grid, window["kernel_size"], heads=3, key_heads=3, dim=32, value_dim=32, bias=True, batch=2),
        dtype,
        **window,
    )


@pytest.mark.parametrize("extra", [0, pytest.param(2, marks=pytest.mark.long)])
def test_strided_and_expanded_tensors(extra):
    tensors = {name: x.float() for name, x in make((3, 5), 3, heads=2, key_heads=2, extra=extra, batch=2).items()}
    strided = {name: x.transpose(1, -1).contiguous().transpose(1, -1) for name, x in tensors.items()}
    strided["key"] = strided["key"][:1].expand(2, -1, -1, -1, -1)
    if extra:
        strided["additional_keys"] = strided["additional_keys"][:1].expand(2, -1, -1, -1)
    dense = {name: x.contiguous() for name, x in strided.items()}
    outs, grads = run(strided, {"kernel_size": 3}, "triton")
    expected, expected_grads = run(dense, {"kernel_size": 3}, "triton")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outs + grads, expected + expected_grads, strict=True))


@pytest.mark.parametrize("extra", [0, pytest.param(2, marks=pytest.mark.long)])
def test_gradients_repeat_bit_by_bit(extra):
    tensors = {name: x.float() for name, x in make((3, 4), 2, extra=extra, bias=True, batch=2).items()}
    first, again = (run(tensors, {"kernel_size": 2}, "triton")[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_large_scores_neither_overflow_nor_vanish(shift):
    tensors = make((4,), 3, bias=True)
    tensors["relative_position_bias"] += shift
    check(tensors, kernel_size=3)


def test_a_map_smaller_than_the_window_is_padded():
    tensors = make((2, 7), 3, bias=True)
    padding = {"key_padding": torch.randn(1, 4), "value_padding": torch.randn(1, 5)}
    window, results = ([3, 3], [1, 1], [1, 2], [0, 0], 0.5), []
    for choice, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in (tensors | padding).items()}
        q, k, v, table, *paddings = leaves.values()
        with use(choice):
            out = neighborhood_attention_op(q, k, v, *window, None, None, table, False, *paddings)
            results.append((*out, *gradients(out, list(leaves.values()))))
    assert_gradients_close(*results)


def test_empty_batch_and_no_additional_keys():
    tensors = make((5, 6), 3, bias=True, batch=0)
    outs, grads = run({name: x.float() for name, x in tensors.items()}, {"kernel_size": 3}, "triton")
    assert outs[0].shape == (0, 5, 6, 1, 5)
    assert [x.shape for x in grads] == [x.shape for x in tensors.values()]
    assert not grads[-1].any()
    tensors = make((4,), 3)
    tensors |= {
        "additional_keys": tensors["key"].new_zeros(1, 0, 1, 4),
        "additional_values": tensors["key"].new_zeros(1, 0, 1, 5),
    }
    check(tensors, kernel_size=3)


def test_wide_heads_run_the_reference(caplog, monkeypatch):
    called = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: called.append(1) or forward(*args))
    tensors = {name: x.float() for name, x in make((3, 3), 3, dim=257).items()}
    run(tensors, {"kernel_size": 3}, "triton")
    assert called
    assert "a head has 257 channels" in caplog.text

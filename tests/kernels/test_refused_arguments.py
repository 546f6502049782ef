"""Options of fused ops that are neither tensors nor sizes, refused by name before anything is computed."""

import math

import numpy as np
import pytest
import torch

from visionmix import kernels, scans

MAP = torch.zeros(1, 8, 8, 2, 8)
SEQUENCE = torch.zeros(1, 5, 2, 8)
X = torch.zeros(1, 4, 6)
DELTA = torch.zeros(1, 4, 4, 4, 8)
CALLS = {
    "na1d": (lambda **options: kernels.na1d(MAP[0], MAP[0], MAP[0], 3, **options), ("scale", "circular", "return_lse")),
    "na2d": (lambda **options: kernels.na2d(MAP, MAP, MAP, 3, **options), ("scale", "circular", "return_lse")),
    "na2d_qk": (lambda **options: kernels.na2d_qk(MAP, MAP, 3, **options), ("scale", "circular")),
    "na2d_av": (lambda **options: kernels.na2d_av(torch.zeros(1, 8, 8, 2, 9), MAP, 3, **options), ("circular",)),
    "gated_linear_attention": (
        lambda **options: kernels.gated_linear_attention(*[SEQUENCE] * 4, **options),
        ("scale", "output_final_state"),
    ),
    "bidirectional_gated_linear_attention": (
        lambda **options: kernels.bidirectional_gated_linear_attention(*[SEQUENCE] * 5, **options),
        ("scale",),
    ),
    "selective_scan": (
        lambda **options: kernels.selective_scan(X, X, torch.zeros(4, 3), *[torch.zeros(1, 3, 6)] * 2, **options),
        ("delta_softplus", "return_last_state"),
    ),
    "selective_scan_2d": (
        lambda **options: kernels.selective_scan_2d(
            torch.zeros(1, 4, 4, 8), DELTA, torch.zeros(4, 8, 1), DELTA[..., :1], DELTA[..., :1], **options
        ),
        ("delta_softplus",),
    ),
}
OPTIONS = [(op, option) for op, (_, options) in CALLS.items() for option in options]


@pytest.mark.parametrize(("op", "option"), OPTIONS)
def test_options_of_another_kind_are_named(op, option):
    call = CALLS[op][0]
    call(**{option: 0.5 if option == "scale" else True})
    wrong = ("x", True, [1.0]) if option == "scale" else (1, "yes", None)
    for value in wrong:
        with pytest.raises(TypeError, match=f"{option}="):
            call(**{option: value})
    for value in (math.nan, math.inf) if option == "scale" else ():
        with pytest.raises(ValueError, match=f"{option}="):
            call(**{option: value})


@pytest.mark.parametrize(("height", "error"), [(-2, ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_sizes_of_grids_are_positive_integers(height, error):
    with pytest.raises(error, match="height="):
        scans.num_steps("raster", height, 4)


def test_a_device_that_pytorch_does_not_know_is_named():
    with pytest.raises(ValueError, match="device='foo'"):
        scans.order("raster", 4, 4, device="foo")


@pytest.mark.parametrize("device", [3.5, ["cpu"], True])
def test_what_is_no_device_is_named(device):
    with pytest.raises(TypeError, match="device="):
        scans.order("raster", 4, 4, device=device)


def test_a_factor_too_large_for_a_float_is_named():
    with pytest.raises(ValueError, match="scale="):
        CALLS["na2d"][0](scale=10**400)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_attention_needs_its_tensors(missing):
    tensors = [MAP, MAP, MAP]
    tensors[missing] = None
    with pytest.raises(TypeError, match=f"{('query', 'key', 'value')[missing]} is a NoneType"):
        kernels.na2d(*tensors, 3)


def test_windows_take_integers_of_numpy():
    assert torch.equal(kernels.na2d(MAP, MAP, MAP, np.int64(3)), kernels.na2d(MAP, MAP, MAP, 3))
    assert scans.num_steps("raster", np.int64(3), 4) == 12


def test_a_scale_that_a_shape_gives_in_graphs():
    def attend(q):
        return kernels.na2d(q, q, q, 3, scale=q.shape[-1] ** -0.5)

    q = torch.randn(1, 8, 8, 2, 8)
    assert torch.equal(torch.jit.trace(attend, q, check_trace=False)(q), attend(q))
    compiled = torch.compile(lambda q, scale: kernels.na2d(q, q, q, 3, scale=scale), fullgraph=True, backend="eager")
    for scale in (0.3, 0.5, 0.7):  # of which the second makes it a symbol
        assert torch.equal(compiled(q, scale), kernels.na2d(q, q, q, 3, scale=scale))

"""The Triton kernels, in Triton's interpreter or on a GPU, against the float64 reference: outputs and every gradient.

Run by test_triton.py in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import importlib
import random

import pytest
import torch
import torch.nn.functional as F
from accelerator import TRITON_DEVICE, needs_gpu
from quick_interpreter import spare_repeated_work
from random_calls import OPS, dense, stray
from tolerance import TOLERANCE, assert_close, gradients

from visionmix import kernels, scans
from visionmix.kernels.selective_scan_2d.chunks import entering_shape
from visionmix.kernels.selective_scan_2d.schema import Arguments, Gradients

if TRITON_DEVICE == "cpu":
    spare_repeated_work()

CROSS = ("raster", "raster_transposed", "raster_reversed", "raster_transposed_reversed")


def check(op, tensors: dict, dtype=torch.float32, *, full=(), **options) -> None:
    """Compare `op` on tensors of a dtype (float32 for those named in `full`) with the float64 reference on the same
    values.
    """

    def run(choice, dtype, full_dtype):
        # Views keep their strides: tensors are cast first and viewed by the maker.
        inputs = {
            name: None if x is None else x.detach().to(full_dtype if name in full else dtype).requires_grad_()
            for name, x in tensors.items()
        }
        used = [x for x in inputs.values() if x is not None]
        with kernels.use(choice):
            out = op(**inputs, **options)
            return out, gradients(out, used)

    # Values that half precision holds, so that both begin from the same.
    tensors = {name: None if x is None else x.to(TRITON_DEVICE, dtype) for name, x in tensors.items()}
    out, grads = run("triton", dtype, torch.float32)
    expected, expected_grads = run("reference", torch.float64, torch.float64)
    pairs = [(out, expected)] if isinstance(out, torch.Tensor) else list(zip(out, expected, strict=True))
    for ours, theirs in pairs:
        if ours is not None:
            # On a GPU, a float32 state of half-precision inputs has the 11 bits of the TF32 products that made it.
            rounded = TRITON_DEVICE == "cuda" and ours.dtype != dtype
            assert_close(ours, theirs, factor=TOLERANCE[torch.float16] / TOLERANCE[torch.float32] if rounded else 1)
    for number, (ours, theirs) in enumerate(zip(grads, expected_grads, strict=True)):
        # The output's gradient is rounded to the output's dtype.
        assert_close(ours, theirs, f"gradient {number}", factor=TOLERANCE[dtype] / TOLERANCE[ours.dtype])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def attention(length, dk, dv, *, strong=False, gates=("g",), batch=1, heads=2):
    names = {"q": dk, "k": dk, "v": dv, **dict.fromkeys(gates, dk)}
    tensors = {name: normal(batch, length, heads, dim, seed=i) for i, (name, dim) in enumerate(names.items())}
    for name in gates:
        tensors[name] = F.logsigmoid(tensors[name])
        if strong:
            tensors[name][:, ::5] = -50
            tensors[name][:, 3::7] = -1e3
    return tensors


@pytest.mark.parametrize(
    ("length", "dk", "dv", "state", "strong"),
    [
        pytest.param(1, 4, 4, True, False, marks=pytest.mark.long),
        (7, 5, 3, True, True),
        (20, 20, 8, False, True),
        pytest.param(40, 20, 8, False, True, marks=pytest.mark.long),
        pytest.param(63, 33, 40, True, True, marks=pytest.mark.long),
        pytest.param(100, 16, 70, True, False, marks=pytest.mark.long),
        pytest.param(333, 8, 8, True, True, marks=pytest.mark.long),
    ],
)
def test_gated_linear_attention(length, dk, dv, state, strong):
    heads = 2 if length < 10 else 1
    tensors = attention(length, dk, dv, strong=strong, heads=heads)
    if state:
        tensors["initial_state"] = normal(1, heads, dk, dv)
    check(kernels.gated_linear_attention, tensors, scale=0.3, output_final_state=state)


@pytest.mark.parametrize(
    ("length", "merge", "strong"),
    [
        (1, "sum", False),
        (18, "mean", True),
        pytest.param(35, "mean", True, marks=pytest.mark.long),
        pytest.param(100, "sum", True, marks=pytest.mark.long),
        pytest.param(333, "mean", False, marks=pytest.mark.long),
    ],
)
def test_bidirectional_gated_linear_attention(length, merge, strong):
    heads = 2 if length < 10 else 1
    tensors = attention(length, 6, 9, strong=strong, gates=("g_forward", "g_backward"), heads=heads)
    check(kernels.bidirectional_gated_linear_attention, tensors, merge=merge)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
def test_attention_in_half_precision(dtype):
    check(kernels.bidirectional_gated_linear_attention, attention(20, 8, 8, gates=("g_forward", "g_backward")), dtype)


@pytest.mark.long
@pytest.mark.parametrize("strong", [False, True])
def test_bfloat16_takes_chunks_of_32(strong):
    tensors = attention(70, 20, 8, gates=("g_forward", "g_backward"), strong=strong)
    check(kernels.bidirectional_gated_linear_attention, tensors, torch.bfloat16)


def test_gates_of_a_decay_of_0():
    tensors = attention(7, 4, 4, heads=1)
    tensors["g"][:, 2::3] = -torch.inf
    check(kernels.gated_linear_attention, tensors)


def test_offsets_of_attention_in_int64(monkeypatch):
    """As tensors need in which a chunk spans 2^31 values."""
    module = importlib.import_module("visionmix.kernels.gated_linear_attention.triton")
    monkeypatch.setattr(module._Problem, "_offset", lambda *_: module.tl.int64)
    check(kernels.gated_linear_attention, attention(3, 4, 4, heads=1))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_weights_beyond_float16(dtype):
    """Keys and queries of 200 give weights of 160,000 before the scale."""
    tensors = attention(7, 4, 4, heads=1, gates=("g_forward", "g_backward"))
    tensors["q"], tensors["k"] = tensors["q"].sign() * 200, tensors["k"].sign() * 200
    check(kernels.bidirectional_gated_linear_attention, tensors, dtype, scale=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("length", [20, 40], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize(("initial", "final"), [(True, False), (False, True)])
def test_attention_with_one_of_the_states(length, initial, final):
    tensors = attention(length, 4, 4, heads=1)
    if initial:
        tensors["initial_state"] = normal(1, 1, 4, 4)
    check(kernels.gated_linear_attention, tensors, output_final_state=final)


@pytest.mark.long
def test_gated_linear_attention_in_bfloat16():
    tensors = attention(35, 8, 8, strong=True) | {"initial_state": normal(1, 2, 8, 8)}
    check(kernels.gated_linear_attention, tensors, torch.bfloat16, output_final_state=True)


def scan(dim, length, states, *, groups=1, constant="", options=True, batch=2):
    tensors = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length, seed=1) - (0 if options else 1),
        "A": -normal(dim, states).abs() * 4,
        "B": normal(dim, states) if "B" in constant else normal(batch, groups, states, length, seed=2),
        "C": normal(dim, states, seed=1) if "C" in constant else normal(batch, groups, states, length, seed=3),
    }
    if not options:
        tensors["delta"] = tensors["delta"].exp()
        return tensors
    return tensors | {"D": normal(dim), "z": normal(batch, dim, length, seed=4), "delta_bias": normal(dim, seed=5)}


@pytest.mark.parametrize(
    ("length", "states", "groups", "constant", "options"),
    [
        (1, 1, 1, "", True),
        (35, 3, 2, "", True),
        (20, 1, 1, "B", False),
        (20, 2, 1, "BC", True),
        pytest.param(63, 4, 1, "C", True, marks=pytest.mark.long),
        pytest.param(100, 16, 2, "", True, marks=pytest.mark.long),
        pytest.param(333, 1, 1, "", False, marks=pytest.mark.long),
    ],
)
def test_selective_scan(length, states, groups, constant, options):
    tensors = scan(4, length, states, groups=groups, constant=constant, options=options)
    check(kernels.selective_scan, tensors, delta_softplus=options, return_last_state=options)


def test_selective_scan_in_bfloat16():
    check(kernels.selective_scan, scan(4, 20, 2), torch.bfloat16, delta_softplus=True)


@pytest.mark.long
@pytest.mark.parametrize("option", ["D", "z", "delta_bias", "return_last_state"])
def test_options_of_the_selective_scan_one_by_one(option):
    tensors = scan(3, 35, 2, options=False)
    values = {"D": normal(3), "z": normal(2, 3, 35), "delta_bias": normal(3).abs()}
    if option in values:
        check(kernels.selective_scan, tensors | {option: values[option]})
    else:
        check(kernels.selective_scan, tensors, return_last_state=True)


def test_softplus_keeps_small_steps():
    tensors = scan(4, 20, 1, options=False) | {"delta_bias": torch.full((4,), -12.0, dtype=torch.float64)}
    check(kernels.selective_scan, tensors, delta_softplus=True)


def maps(height, width, channels, states, count, rank=0, *, options=True, batch=1):
    delta = normal(batch, height, width, count, rank or channels)
    tensors = {
        "x": normal(batch, channels, height, width).permute(0, 2, 3, 1),
        "delta": delta,
        "A": -normal(count, channels, states).abs() * 4,
        "B": normal(batch, height, width, count, states, seed=1),
        "C": normal(batch, height, width, count, states, seed=2),
    }
    if rank:
        tensors["delta_weight"] = normal(count, channels, rank)
    if options:
        tensors |= {"D": normal(count, channels), "delta_bias": normal(count, channels, seed=1)}
    return tensors


def selective_scan_2d(delta, delta_weight=None, **rest):
    return kernels.selective_scan_2d(delta=delta if delta_weight is None else (delta, delta_weight), **rest)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few channels a program where every number is interpreted."""
    if TRITON_DEVICE == "cpu":
        monkeypatch.setattr(importlib.import_module("visionmix.kernels.selective_scan_2d.triton"), "_NARROW", 4)


@pytest.mark.parametrize(
    ("height", "width", "states", "rank", "orders", "merge"),
    [
        (3, 5, 1, 3, CROSS, "sum"),
        (5, 4, 2, 0, ("hilbert", "raster_reversed"), "mean"),
        (2, 3, 1, 20, ("raster", "raster_reversed"), "sum"),
        pytest.param(
            3, 6, 1, 2, ("raster", "hilbert_reversed", "raster_reversed", "hilbert"), "mean", marks=pytest.mark.long
        ),
        pytest.param(5, 4, 1, 2, ("raster+raster_transposed", "snake"), "none", marks=pytest.mark.long),
        pytest.param(5, 7, 1, 0, ("window_2", "raster"), "sum", marks=pytest.mark.long),
        pytest.param(1, 1, 1, 2, CROSS, "sum", marks=pytest.mark.long),
        pytest.param(9, 37, 1, 0, ("raster", "raster_reversed"), "none", marks=pytest.mark.long),
        pytest.param(9, 11, 1, 2, CROSS, "mean", marks=pytest.mark.long),
        pytest.param(9, 11, 3, 2, ("window_2", "atrous_2+raster"), "sum", marks=pytest.mark.long),
    ],
)
def test_selective_scan_2d(height, width, states, rank, orders, merge):
    tensors = maps(height, width, 5, states, len(orders), rank, options=merge != "mean")
    check(selective_scan_2d, tensors, delta_softplus=True, orders=orders, merge=merge)


@pytest.mark.parametrize(
    ("height", "width", "left", "states", "rank", "merge"),
    [
        (3, 7, 13, 1, 2, "sum"),
        pytest.param(2, 4, 8, 2, 0, "none", marks=pytest.mark.long),
        pytest.param(5, 9, 33, 2, 0, "mean", marks=pytest.mark.long),
        pytest.param(2, 2, 1, 1, 20, "sum", marks=pytest.mark.long),
        pytest.param(6, 7, 20, 3, 3, "none", marks=pytest.mark.long),
    ],
)
def test_selective_scan_2d_of_what_is_left(height, width, left, states, rank, merge):
    """Steps given as cells, each image its own, with gaps; orders that read a part of the cells, and padded steps."""
    names = ("raster", "hilbert_reversed", "skip_2_0_1")
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, height * width, generator=generator).argsort(1)[:, :left].sort(1).values
    inverses = torch.stack([scans.order(name, height, width).inverse for name in names])
    cells, gaps = (steps.to(TRITON_DEVICE) for steps in scans.kept_steps(inverses, kept))
    tensors = maps(1, left, 5, states, len(names), rank, options=merge != "mean", batch=2)
    check(selective_scan_2d, tensors, delta_softplus=True, cells=cells, gaps=gaps, merge=merge)


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(("raster", "raster_reversed"), id="both ways"),
        pytest.param(CROSS, id="cross", marks=pytest.mark.long),
        pytest.param(("raster+raster_transposed", "snake"), id="joined", marks=pytest.mark.long),
    ],
)
def test_offsets_of_large_maps_and_rows_apart(monkeypatch, orders):
    """Offsets in int64, as a map of 2^31 values needs, and maps that are cut out of wider ones."""
    module = importlib.import_module("visionmix.kernels.selective_scan_2d.triton")
    monkeypatch.setattr(module._Problem, "needs_int64", lambda *_: True)

    def cut(x, delta, B, C, **rest):
        x, delta, B, C = (F.pad(y, (0,) * (2 * y.dim() - 5) + (2,))[:, :, : y.shape[2]] for y in (x, delta, B, C))
        return selective_scan_2d(x=x, delta=delta, B=B, C=C, **rest)

    check(cut, maps(3, 4, 5, 2, len(orders), 2), delta_softplus=True, orders=orders)


def test_states_over_maps_are_kept_or_found_again():
    module = importlib.import_module("visionmix.kernels.selective_scan_2d.triton")
    orders = CROSS[:1] + CROSS[2:3]
    tensors = {name: x.to(TRITON_DEVICE, torch.float32) for name, x in maps(3, 7, 3, 2, 2, 2).items()}
    weight = tensors.pop("delta_weight")
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias")
    x, delta, *parameters = (tensors[name] for name in names)
    arguments = Arguments(x, delta, weight, *parameters, True, ",".join(orders), "sum", "all", keep_states=True)
    out, entering = module.forward(arguments)
    assert entering.shape == entering_shape(x, tensors["A"], 21)
    assert torch.equal(module.forward(arguments._replace(keep_states=False))[0], out)
    kept, found = (module.backward(arguments, Gradients(out, states)) for states in (entering, None))
    assert all(map(torch.equal, kept, found))


def test_selective_scan_2d_in_bfloat16():
    check(selective_scan_2d, maps(3, 4, 4, 1, 4, 2), torch.bfloat16, delta_softplus=True)


FLOAT32_OUTPUTS = {
    "scan": (kernels.selective_scan, scan(2, 5, 1), {}),
    "maps": (selective_scan_2d, maps(2, 2, 2, 1, 4), {"merge": "mean", "delta_softplus": True}),
    "routes": (selective_scan_2d, maps(2, 2, 2, 1, 4), {"merge": "none", "delta_softplus": True}),
    "bidirectional": (
        kernels.bidirectional_gated_linear_attention,
        attention(5, 4, 4, gates=("g_forward", "g_backward"), heads=1),
        {},
    ),
}


@pytest.mark.parametrize("case", FLOAT32_OUTPUTS)
def test_output_in_float32(case):
    op, tensors, options = FLOAT32_OUTPUTS[case]
    halves = {name: x.to(TRITON_DEVICE, torch.float16) for name, x in tensors.items()}
    doubles = {name: x.double().requires_grad_() for name, x in halves.items()}
    halves = {name: x.requires_grad_() for name, x in halves.items()}
    expected = op(**doubles, **options)
    with kernels.use("triton"):
        out = op(**halves, **options, out_dtype=torch.float32)
        grads = gradients(out, list(halves.values()))
    assert out.dtype == torch.float32
    rounded = TRITON_DEVICE == "cuda" and case == "bidirectional"  # TF32 products
    assert_close(out, expected, factor=TOLERANCE[torch.float16] / TOLERANCE[torch.float32] if rounded else 1)
    for name, ours, theirs in zip(halves, grads, gradients(expected, list(doubles.values())), strict=True):
        assert ours.dtype == torch.float16
        assert_close(ours, theirs, name)


def viewed(op, **expanded):
    """`op` on tensors of transposed storage, those named expanded along an axis; gradients are of what is viewed."""

    def call(**arguments):
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                arguments[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
                if name in expanded:
                    arguments[name] = x.narrow(expanded[name], 0, 1).expand_as(x)
        return op(**arguments)

    return call


@pytest.mark.parametrize(
    ("op", "tensors", "options"),
    [
        (viewed(kernels.gated_linear_attention, k=2, g=1), attention(18, 8, 8), {}),
        pytest.param(
            viewed(kernels.bidirectional_gated_linear_attention, q=1, g_backward=2),
            attention(35, 8, 8, gates=("g_forward", "g_backward")),
            {},
            marks=pytest.mark.long,
        ),
        (viewed(kernels.selective_scan, z=2, B=0), scan(3, 20, 2), {"delta_softplus": True}),
        pytest.param(
            viewed(kernels.selective_scan, u=1, delta=2, C=3, A=0),
            scan(4, 35, 2, groups=2),
            {"delta_softplus": True, "return_last_state": True},
            marks=pytest.mark.long,
        ),
        pytest.param(
            viewed(selective_scan_2d, x=3, delta=1, B=3, C=2, delta_weight=0),
            maps(4, 5, 4, 2, 4, 2, batch=2),
            {"orders": CROSS, "delta_softplus": True},
            marks=pytest.mark.long,
        ),
    ],
    ids=["attention", "bidirectional", "scan", "scan, groups", "maps"],
)
def test_strided_and_expanded_tensors(op, tensors, options):
    check(op, tensors, **options)


@pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="random calls are made on the CPU")
@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_random_strides_of_axes_of_length_1(op):
    for seed in range(6):
        rng = random.Random(f"{op} {seed}")
        call = OPS[op](rng)
        with kernels.use("triton"):
            expected, actual = call.outputs_and_gradients(dense), call.outputs_and_gradients(stray(rng))
        for name, ours in actual.items():
            assert_close(ours, expected[name], f"{op}, seed {seed}: {name}", factor=3)


def test_float64_runs_the_reference():
    tensors = {name: x.to(TRITON_DEVICE) for name, x in scan(4, 5, 1).items()}
    with kernels.use("triton"):
        out = kernels.selective_scan(**tensors)
    with kernels.use("reference"):
        assert torch.equal(out, kernels.selective_scan(**tensors))


# A's gradient, a sum over all tokens, passes what float16 holds; models keep A in float32.
LARGE = {
    "gated_linear_attention": (
        kernels.gated_linear_attention,
        lambda: attention(4096, 32, 64, batch=2, heads=12),
        {"output_final_state": True},
    ),
    "bidirectional_gated_linear_attention": (
        kernels.bidirectional_gated_linear_attention,
        lambda: attention(1025, 32, 64, batch=2, heads=6, gates=("g_forward", "g_backward")),
        {},
    ),
    "selective_scan": (kernels.selective_scan, lambda: scan(192, 3136, 16), {"delta_softplus": True, "full": ("A",)}),
    "selective_scan_2d": (
        selective_scan_2d,
        lambda: maps(56, 56, 192, 1, 4, 6, batch=2),
        {"orders": CROSS, "delta_softplus": True, "full": ("A",)},
    ),
    "selective_scan_2d, 16 states": (
        selective_scan_2d,
        lambda: maps(28, 30, 96, 16, 4, 6, batch=2),
        {"orders": CROSS, "delta_softplus": True, "full": ("A",)},
    ),
    "selective_scan_2d, hilbert": (
        selective_scan_2d,
        lambda: maps(33, 40, 96, 1, 2, batch=2),
        {"orders": ("hilbert", "hilbert_reversed"), "delta_softplus": True, "merge": "mean", "full": ("A",)},
    ),
}


@needs_gpu
@pytest.mark.skipif(TRITON_DEVICE == "cpu", reason="takes hours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_maps_of_models(case, dtype):
    op, tensors, options = LARGE[case]
    check(op, tensors(), dtype, **options)

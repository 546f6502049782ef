"""Multiply-adds of reduced models, and times in turns."""

import functools
import math

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionmix import kernels, reduction
from visionmix.tools import benchmark, info, reduce_curve, timing

DIM, CELLS, CLASSES = 384, 196, 1000


def counted_by_hand(blocks: list[tuple[int, int, int, int]], extra: float = 0.0) -> float:
    """Return the multiply-adds of DeiT-S, whose blocks have (queries, keys, values, tokens of the feed-forward)."""
    total = CELLS * 768 * DIM + DIM * CLASSES + extra
    for queries, keys, values, tokens in blocks:
        total += (queries + keys + values) * DIM * DIM + queries * (keys + values) * DIM  # q, k, v; q k^T and A v
        total += tokens * 9 * DIM * DIM  # projection and feed-forward
    return total


def same(*counts: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Return blocks of plain attention: (blocks, tokens) each."""
    return [(tokens,) * 4 for blocks, tokens in counts for _ in range(blocks)]


PRUNED = same((3, 197), (3, 138), (3, 97), (3, 68))


def predictors(*tokens: int) -> float:
    return sum(count * (DIM * DIM + DIM * DIM // 2 + DIM * DIM // 8 + DIM // 2) for count in tokens)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, counted_by_hand(same((12, 197)))),
        (
            {"method": "dynamicvit"},
            counted_by_hand(same((3, 197), (3, 138), (3, 97), (3, 68)), predictors(196, 137, 96)),
        ),
    ],
    ids=str,
)
def test_multiply_adds_are_those_counted_by_hand(spec, expected):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    if spec:
        model = reduction.apply(model, **spec)
    assert sum(info.measure(model, (3, 224, 224)).macs.values()) == expected


@pytest.mark.parametrize("layers", [[0], [1]])
def test_multiply_adds_of_merging_before_attention(layers):
    """The map of all tokens weighs values of all, which are made from the merged ones; the similarity is a product."""
    with torch.device("meta"):
        model = reduction.apply(timm.create_model("deit_small_patch16_224"), "mctf", r=16, layers=layers)
    (at,) = layers
    blocks = same((at, 197), (1, 197), (11 - at, 181))
    less = 16 * (DIM * DIM + 9 * DIM * DIM)  # values, projection and feed-forward of the block that merges
    similarity = 99 * 98 * DIM
    assert sum(info.measure(model, (3, 224, 224)).macs.values()) == counted_by_hand(blocks, similarity - less)


def test_multiply_adds_of_merging_behind_attention():
    with torch.device("meta"):
        model = reduction.apply(timm.create_model("deit_small_patch16_224"), "tome", r=13)
    tokens = [197 - 13 * block for block in range(12)]
    less = sum(13 * 8 * DIM * DIM for _ in tokens)  # the feed-forward sees fewer than the projection
    similarity = sum((count + 1) // 2 * (count // 2) * 64 for count in tokens)  # of keys, averaged over the heads
    expected = counted_by_hand(same(*((1, count) for count in tokens)), similarity - less)
    assert sum(info.measure(model, (3, 224, 224)).macs.values()) == expected


def test_multiply_adds_of_pruning_behind_attention():
    with torch.device("meta"):
        model = reduction.apply(timm.create_model("deit_small_patch16_224"), "evit", keep_rate=0.7)
    tokens, extra = [], 0.0
    count = 197
    for block in range(12):
        tokens.append((1, count))
        if block in (3, 6, 9):
            kept = math.ceil(0.7 * (count - 1))
            gone = count - 1 - kept
            extra += (count + gone) * DIM  # the class token's weights once more, and the mean of those that go
            count = kept + 2
            extra -= (gone - 1) * 8 * DIM * DIM
    assert sum(info.measure(model, (3, 224, 224)).macs.values()) == counted_by_hand(same(*tokens), extra)


PRODUCTS = ("addmm", "bmm", "conv", "linear", "matmul", "scaled_dot_product_attention")  # that PyTorch counts too


def small_vit():
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@functools.cache
def macs_of_the_whole() -> int:
    return sum(info.measure(small_vit(), (3, 64, 64)).macs.values())


@pytest.mark.parametrize(
    "spec",
    [
        "tome:r=5",
        "mctf:r=5",
        "mctf_fast",
        "evit:keep_rate=0.6",
        "avit",
        "zero_tprune:similar=3",
        "dynamicvit:keep_rate=0.6",
        "ats:samples=9",
        "algm:threshold=0.1",
    ],
)
def test_counters_of_operations_agree(spec):
    """PyTorch's, fvcore's, that of `visionmix benchmark` and that of `visionmix reduce-curve`."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = reduction.apply(small_vit(), spec)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(noise)
    macs = counter.get_total_flops() / 2
    assert sum(info.measure(model, (3, 64, 64)).macs.values()) == macs
    assert reduce_curve.gmacs(model, noise) * 1e9 == pytest.approx(macs, rel=1e-12)
    analysis = fvcore.FlopCountAnalysis(model, noise).set_op_handle(**kernels.fvcore_handles())
    operators = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert sum(count for name, count in operators.items() if name in PRODUCTS) == macs
    if spec != "avit":  # which masks
        assert macs < 0.95 * macs_of_the_whole()


def test_a_model_whose_shapes_depend_on_the_image_is_counted_on_one():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    whole = sum(info.measure(model, (3, 64, 64)).macs.values())
    fast = reduction.apply(model, "ats", layers=[0], samples=4)
    assert 0.3 < sum(info.measure(fast, (3, 64, 64)).macs.values()) / whole < 0.8
    assert {value.device.type for value in fast.parameters()} == {"cpu"}


def test_turns_compare_times_of_one_round(monkeypatch):
    """The machine is twice as slow in the second round: ratios do not see it."""
    ticks = iter([0, 4, 4, 6, 6, 14, 14, 18])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    called = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    assert timing.in_turns(calls, 2) == {"a": [4, 8], "b": [2, 4]}
    assert called == ["a", "b"] * 3
    assert timing.spread([1.0, 2.0, 3.0]).p50 == 2.0


def test_the_tool_measures_in_turns(tmp_path, capsys):
    csv = tmp_path / "rows.csv"
    arguments = ["test_vit", "--reduce", "tome:r=3", "--img-size", "160", "--threads", "1", "--turns", "2"]
    arguments += ["--csv", str(csv)]
    assert benchmark.main(arguments) == 0
    first, second = csv.read_text().splitlines()[1:]
    assert first.startswith("test_vit,forward,160,1,")
    assert second.startswith("test_vit+tome:r=3,forward,160,1,")
    assert "times the first" in capsys.readouterr().out


def test_scans_of_kept_cells_are_counted_by_their_steps():
    """Keeping all cells counts as the whole model does, keeping half of them less."""
    whole = timm.create_model("test_plainmamba").eval()

    def scans(model):
        return info.measure(model, (3, 64, 64)).macs["visionmix.selective_scan_2d"]

    kept = [scans(reduction.apply(whole, "ssm_prune", keep_rate=rate, layers=[1])) for rate in (1.0, 0.5)]
    assert kept[0] == scans(whole)
    assert 0 < kept[1] < kept[0]

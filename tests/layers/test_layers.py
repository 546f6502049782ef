"""Layers against what their docstrings say, at odd sizes too."""

import math
from functools import partial

import pytest
import torch
import torch.fx
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import visionmix
from visionmix.layers import (
    BatchNorm,
    ChannelGate,
    ConvDownsample,
    ConvGlu,
    ConvMlp,
    ConvsDownsample,
    CornerHead,
    LogSigmoid,
    MultiScalePatches,
    NormConvDownsample,
    OffsetLayerNorm,
    PatchMerging,
    RmsNorm,
    RotaryMap,
    SelectiveScan2d,
    Stem,
    StemConv,
    feed_forward,
    gate,
    mlp,
    patch_stem,
    pool_map,
    swiglu,
    tiles,
)
from visionmix.layers.maps import channels_first, channels_last


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 6), (4, 7), (5, 3)])
def test_patch_merging_takes_the_cells_column_by_column(size):
    layer = PatchMerging(3, 5)
    x = torch.randn(2, *size, 3)
    rows, columns = -(-size[0] // 2), -(-size[1] // 2)
    out = layer(x)
    assert out.shape == (2, rows, columns, 5)
    padded = torch.zeros(2, 2 * rows, 2 * columns, 3)
    padded[:, : size[0], : size[1]] = x
    for row in range(rows):
        for column in range(columns):
            top, left = 2 * row, 2 * column
            cells = [padded[:, top + down, left + right] for right in (0, 1) for down in (0, 1)]
            expected = layer.reduction(layer.norm(torch.cat(cells, dim=-1)))
            assert torch.allclose(out[:, row, column], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_patch_merging_compiled_pads_as_eager_does(size):
    layer = PatchMerging(3, 5).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(1, *size, 3)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [(6, 4), (5, 7), (1, 4)])
def test_norm_conv_downsample_pads_behind_the_norm_or_leaves_out(size, whole):
    layer = NormConvDownsample(3, 5, whole=whole)
    nn.init.normal_(layer.norm.bias)  # so that zeros before the norm would not be zeros behind it
    x = torch.randn(2, *size, 3)
    rows, columns = (max((side + whole) // 2, 1) for side in size)
    out = layer(x)
    assert out.shape == (2, rows, columns, 5) == (2, *layer.grid_size(*size), 5)
    padded = torch.zeros(2, 2 * rows + 1, 2 * columns + 1, 3)
    padded[:, : size[0], : size[1]] = layer.norm(x)
    for row in range(rows):
        for column in range(columns):
            cells = padded[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = torch.einsum("brck,dkrc->bd", cells, layer.conv.weight)
            assert torch.allclose(out[:, row, column], expected + layer.conv.bias, atol=1e-6)


def test_conv_mlp_adds_the_neighbours():
    layer = ConvMlp(6)
    x = torch.randn(2, 3, 5, 6)
    hidden = F.linear(x, layer.fc1.weight, layer.fc1.bias).permute(0, 3, 1, 2)
    hidden = F.gelu(hidden + F.conv2d(hidden, layer.conv.weight, layer.conv.bias, padding=1, groups=12))
    assert torch.allclose(layer(x), F.linear(hidden.permute(0, 2, 3, 1), layer.fc2.weight, layer.fc2.bias), atol=1e-6)


def test_conv_glu_convolves_its_gate_alone():
    layer = ConvGlu(6, mlp_ratio=2)
    x = torch.randn(2, 3, 5, 6)
    gate, value = F.linear(x, layer.fc1.weight, layer.fc1.bias).split(8, dim=-1)
    gate = F.conv2d(gate.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=1, groups=8)
    expected = F.linear(F.gelu(gate).permute(0, 2, 3, 1) * value, layer.fc2.weight, layer.fc2.bias)
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.fixture
def tiles_of_five(monkeypatch):
    """Makes feed-forwards take five tokens at a time, however few there are."""
    monkeypatch.setattr(tiles, "_LARGE", 0)
    monkeypatch.setattr(feed_forward, "_TILE", 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("make", [mlp, partial(swiglu, multiple_of=8), partial(swiglu, multiple_of=1, bias=True)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (10, 6), (1, 3, 6)])
def test_tiles_of_a_feed_forward_make_the_whole(tiles_of_five, monkeypatch, make, shape):
    module, x = make(6).eval(), torch.randn(shape)
    whole, seen = module._whole(x), []
    monkeypatch.setattr(module, "_whole", lambda tile, whole=module._whole: seen.append(tile.shape) or whole(tile))
    with torch.inference_mode():
        assert torch.allclose(module(x), whole, atol=1e-6)
    tokens = math.prod(shape[:-1])
    assert [rows for rows, _ in seen] == [5] * (tokens // 5) + [tokens % 5] * (tokens % 5 > 0)
    seen.clear()
    module(x)  # with gradients, which need what is inside
    assert seen == [x.shape]


@pytest.mark.parametrize("shape", [(1, 7, 3, 12), (2, 7, 3, 4, 12)])
def test_tiles_of_rows_make_the_gates_of_the_whole_map(monkeypatch, shape):
    layer, x = ChannelGate(12).eval(), torch.randn(shape)
    with torch.inference_mode():
        whole = layer.gates(x)
        monkeypatch.setattr(tiles, "_LARGE", 0)
        monkeypatch.setattr(gate, "_TILE", 2 * x[:, 0].numel())
        norms = []
        monkeypatch.setattr(layer.norm, "forward", lambda x, f=layer.norm.forward: norms.append(x.shape[1]) or f(x))
        assert torch.allclose(layer.gates(x), whole, atol=1e-6)
    assert norms == [2, 2, 2, 1]


def test_tiles_keep_the_type_of_autocast(tiles_of_five):
    module, x = mlp(6).eval(), torch.randn(2, 12, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_hooks_inside_a_feed_forward_see_all_tokens(tiles_of_five):
    module, x, seen = mlp(6).eval(), torch.randn(2, 12, 6), []
    module.fc1.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    with torch.inference_mode():
        module(x)
    assert seen == [(2, 12, 24)]


@pytest.mark.parametrize("trace", [torch.jit.script, torch.fx.symbolic_trace, "jit", "export"])
def test_graphs_have_no_tiles(tiles_of_five, trace):
    module, x, other = mlp(6).eval(), torch.randn(1, 7, 6), torch.randn(1, 12, 6)
    with torch.no_grad():
        if trace == "jit":
            graph = torch.jit.trace(module, x)
        elif trace == "export":
            graph = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim.AUTO},)).module()
        else:
            graph = trace(module)
        assert torch.allclose(graph(other), module(other), atol=1e-6)


def test_options_of_stems_and_downsamplers():
    assert patch_stem(3, 8, 4)(torch.randn(1, 3, 19, 9)).shape == (1, *patch_stem(3, 8, 4).grid_size(19, 9), 8)
    assert not hasattr(patch_stem(3, 8, 16, norm_layer=None), "norm1")
    whole, image = patch_stem(3, 8, 4, whole=True), torch.randn(1, 3, 19, 9)
    assert torch.equal(whole(image), whole(torch.nn.functional.pad(image, [0, 3, 0, 1])))
    assert whole(image).shape == (1, *whole.grid_size(19, 9), 8) == (1, 5, 3, 8)
    with pytest.raises(ValueError, match=r"whole=True.*kernel_size=7"):
        patch_stem(3, 8, 4, kernel_size=7, padding=2, whole=True)
    assert ConvDownsample(4, 8, bias=False).conv.bias is None


def test_selective_scan_equals_formula():
    torch.manual_seed(0)
    orders = ("snake", "raster_transposed_reversed")
    scan = SelectiveScan2d(4, orders, dt_rank=2, d_state=3).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = torch.zeros(2, 12, 4, dtype=torch.float64)
    for k, name in enumerate(orders):
        index = visionmix.scans.order(name, 3, 4).index
        sequence = x.flatten(1, 2)[:, index]
        weight = scan.x_proj.weight.unflatten(0, (2, 8))[k]
        low, B, C = (sequence @ weight.T).split([2, 3, 3], dim=-1)
        delta = F.softplus(low @ scan.delta_weight[k].T + scan.delta_bias[k])
        state = torch.zeros(2, 4, 3, dtype=torch.float64)
        for step in range(12):
            decay = torch.exp(-delta[:, step, :, None] * scan.A_log[k].exp())
            state = decay * state + (delta[:, step] * sequence[:, step])[..., None] * B[:, step, None]
            expected[:, index[step]] += (state * C[:, step, None]).sum(-1) + scan.D[k] * sequence[:, step]
    with visionmix.kernels.use("reference"):
        assert torch.allclose(scan(x).flatten(1, 2), expected, atol=1e-12)


def test_selective_scan_begins_as_mamba_does():
    scan = SelectiveScan2d(64, ("raster",), dt_rank=4, d_state=16)
    steps = F.softplus(scan.delta_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 * 1.001
    assert torch.allclose(scan.A_log.exp(), torch.arange(1.0, 17).expand(1, 64, 16))


@pytest.mark.parametrize("option", ["dt_rank", "d_state"])
def test_selective_scan_refuses_empty_sizes(option):
    with pytest.raises(ValueError, match=f"{option}=0 is too small"):
        SelectiveScan2d(4, ("raster",), **({"dt_rank": 1, "d_state": 1} | {option: 0}))


def test_log_sigmoid_is_exact_and_differentiable():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-1e4, -20.0, 0.0, 1e4])]).requires_grad_()
    expected = torch.nn.functional.logsigmoid(x.detach().double())
    out = LogSigmoid()(x)
    assert ((out - expected).abs() <= 1e-7 + 1e-7 * expected.abs()).all()
    out.sum().backward()
    assert torch.allclose(x.grad.double(), torch.sigmoid(-x.detach().double()), atol=1e-6)
    assert LogSigmoid()(x.detach().bfloat16()).dtype == torch.float32


def naive_turns(x, height, width, endpoint=True):
    """Return x (batch, height * width, heads, dim) turned pair by pair, as complex numbers in float64."""
    pairs = torch.view_as_complex(x.detach().double().unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[-1] // 2
    out = pairs.clone()
    for token in range(height * width):
        for pair in range(2 * count):
            position = token // width if pair < count else token % width
            frequency = 10000.0 ** -(pair % count / (max(count - 1, 1) if endpoint else count))
            out[:, token, :, pair] *= complex(math.cos(position * frequency), math.sin(position * frequency))
    return torch.view_as_real(out).flatten(-2)


@pytest.mark.parametrize("endpoint", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (1, 7)])
def test_rotary_map_turns_pairs_by_row_and_column(size, dtype, endpoint):
    x = torch.randn(2, size[0] * size[1], 3, 12).to(dtype)
    out = RotaryMap(endpoint)(x, *size)
    # With an endpoint the frequencies are of float32 whatever comes in.
    bound = 1e-5 if endpoint or dtype != torch.float64 else 1e-13
    assert torch.allclose(out.double(), naive_turns(x, *size, endpoint), rtol=0, atol=bound)


@pytest.mark.parametrize("layout", ["slice", "odd", "spread"])
def test_rotary_map_takes_any_strides(layout):
    memory = torch.randn(2, 15, 3, 2, 26)
    x = {"slice": memory[:, :, :, 0, 2:10], "odd": memory[:, :, :, 0, 1:9], "spread": memory[..., 0, ::2][..., :8]}
    x = x[layout].requires_grad_()
    out, expected = RotaryMap()(x, 5, 3), naive_turns(x, 5, 3)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    (grad,) = torch.autograd.grad(out, x, out.detach())
    assert torch.allclose(grad, x, atol=1e-5)  # turned and turned back


def in_inference_mode(layer, x, size):
    with torch.inference_mode():
        layer(x, *size)


def under_a_transform(layer, x, size):
    torch.func.grad(lambda x: layer(x, *size).sum())(x)


def with_fake_tensors(layer, x, size):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x), *size)


def beside_the_meta_device(layer, x, size):
    with torch.device("meta"):
        layer(x, *size)


FIRST = [in_inference_mode, under_a_transform, with_fake_tensors, beside_the_meta_device]


@pytest.mark.parametrize(("number", "first"), list(enumerate(FIRST)))
def test_kept_rotary_angles_serve_training(number, first):
    layer, size = RotaryMap(), (6, 11 + number)  # a size that no other test has made
    x = torch.randn(1, size[0] * size[1], 2, 8, requires_grad=True)
    first(layer, x.detach(), size)
    out = layer(x, *size)
    (grad,) = torch.autograd.grad(out, x, out.detach())
    assert torch.allclose(out.double(), naive_turns(x, *size), atol=1e-5)
    assert torch.allclose(grad, x, atol=1e-5)


@pytest.mark.parametrize(("number", "first"), list(enumerate(FIRST)))
def test_kept_averages_serve_training(number, first):
    size = (6, 23 + number)  # a size that no other test has made
    x = torch.randn(2, *size, 3, requires_grad=True)
    first(lambda x, *_: pool_map(x, 4, 5), x.detach(), size)
    out = pool_map(x, 4, 5)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (4, 5)).permute(0, 2, 3, 1)
    assert torch.allclose(out, expected, atol=1e-6)
    grads = [torch.autograd.grad(each, x, expected.detach())[0] for each in (out, expected)]
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize(
    "graph",
    [torch.jit.script, lambda layer: torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")],
    ids=["script", "compile"],
)
@pytest.mark.parametrize("endpoint", [True, False])
def test_rotary_map_in_graphs_equals_eager(graph, endpoint):
    layer = RotaryMap(endpoint)
    inside = graph(layer)
    for size in [(4, 6), (5, 3)]:
        x = torch.randn(2, size[0] * size[1], 2, 8)
        assert torch.allclose(inside(x, *size), layer(x, *size), atol=1e-6)


def test_rotary_map_maps_over_a_batch():
    x = torch.randn(3, 2, 15, 2, 8)
    out = torch.func.vmap(lambda y: RotaryMap()(y, 5, 3))(x)
    assert torch.allclose(out.flatten(0, 1), RotaryMap()(x.flatten(0, 1), 5, 3), atol=1e-6)


@pytest.mark.parametrize("layer", [channels_first, channels_last])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layouts_are_copied_only_on_a_cpu(device, layer):
    x = torch.randn(2, 5, 3, 4, device=device)
    out = layer(x)
    assert out.shape == ((2, 4, 5, 3) if layer is channels_first else (2, 3, 4, 5))
    assert out.is_contiguous() == (device == "cpu")
    assert out.data_ptr() != x.data_ptr() or device == "meta"


_CONV = StemConv(6, 3, 2, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
ENTRIES = {
    "stem": lambda: Stem(4, [_CONV]),
    "patch_stem": lambda: patch_stem(4, 6, 2, norm_layer=None),
    "multi_scale_stem": lambda: MultiScalePatches(4, 6, 2, images=True),
    "conv": lambda: ConvDownsample(4, 6, norm_layer=BatchNorm),
    "convs": lambda: ConvsDownsample(4, [_CONV]),
    "norm_conv": lambda: NormConvDownsample(4, 6),
    "multi_scale": lambda: MultiScalePatches(4, 6, 2),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_stage_begins_with_channels_last(name):
    shape = (2, 4, 6, 10) if "stem" in name else (2, 6, 10, 4)
    with torch.no_grad():
        out = ENTRIES[name]().eval()(torch.randn(shape))
    assert out.shape == (2, 3, 5, 6)
    assert out.is_contiguous()


@pytest.mark.parametrize("corners", [2, 4])
def test_corner_head_reads_the_corners(corners):
    torch.manual_seed(0)
    head = CornerHead(6, 3, corners=corners, norm_layer=nn.LayerNorm).eval()
    x = torch.randn(2, 4, 5, 6)
    cells = [x[:, 0, 0], x[:, -1, -1]] if corners == 2 else [x[:, 0, 0], x[:, -1, 0], x[:, 0, -1], x[:, -1, -1]]
    expected = head.fc(head.norm(torch.cat(cells, dim=-1)))
    assert torch.equal(head(x), expected)
    assert torch.equal(torch.jit.script(head)(x), expected)
    head.reset(3, "avg")
    assert head.hidden_size == 6
    assert torch.allclose(head(x), head.fc(x.mean((1, 2))), atol=1e-6)
    head.reset(0, "")
    assert torch.equal(head(x), x)
    head.reset(2, "corners")
    assert head(x).shape == (2, 2)
    with pytest.raises(ValueError, match="corners=3 is not a choice"):
        CornerHead(6, 3, corners=3)


def test_offset_layer_norm_stores_its_weight_less_one():
    norm, ordinary = OffsetLayerNorm(6, eps=1e-3), nn.LayerNorm(6, eps=1e-3)
    x = torch.randn(2, 6)
    assert torch.equal(norm(x), ordinary(x))
    with torch.no_grad():
        norm.weight.fill_(0.5)
        ordinary.weight.fill_(1.5)
    assert torch.equal(norm(x), ordinary(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rms_norm_in_inference_is_that_of_training(dtype):
    norm = RmsNorm(24, eps=1e-3, dtype=dtype)
    torch.nn.init.uniform_(norm.weight)
    x = (30 * torch.randn(2, 5, 3, 24)).to(dtype)
    before, trained = x.clone(), norm(x)
    with torch.inference_mode():
        out = norm(x)
    assert out.dtype == dtype
    assert torch.equal(x, before)
    torch.testing.assert_close(out, trained.detach())

"""Pruning of models whose scans read maps: a naive pass, place by place, and what follows from it."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionmix import reduction, scans
from visionmix.backbones import Hierarchical, Plain
from visionmix.kernels import use
from visionmix.models.plainmamba import VARIANTS as PLAINMAMBA
from visionmix.models.vmamba import VARIANTS as VMAMBA

MIXER = {"name": "plain_scan", "permute": "input", "bias_scale": 2.0, "d_state": 3, "d_conv": 3}
PLAIN = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "depth": 3, "drop_path_rate": 0.1}
STAGES = {"img_size": 48, "embed_dims": (4, 8), "depths": (2, 3)}


def made(skeleton, options) -> torch.nn.Module:
    """Return a small float64 model in eval mode, of weights large enough that its states matter."""
    torch.manual_seed(0)
    model = skeleton(**options).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("x_proj.weight", "in_proj.weight", "mixer.proj.weight", "move_B")):
                value.normal_(std=0.3)
            if name.endswith("conv.weight") and "mixer" in name:
                value.normal_(std=0.2)
    return model.eval()


def plainmamba(**mixer) -> torch.nn.Module:
    return made(Plain, PLAINMAMBA["test_plainmamba"].layout.options | PLAIN | {"mixer": MIXER | mixer})


def vmamba(name="test_vmamba", **options) -> torch.nn.Module:
    return made(Hierarchical, VMAMBA[name].layout.options | STAGES | options)


def images(batch: int = 2, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


def naive_scan(scan, x: Tensor, left: list[int], grid: tuple[int, int]) -> list[Tensor]:
    """Return each order's output at the cells `left`, whose values are x (left, channels), visiting every place."""
    steps, B, C = scan.x_proj(x).unflatten(-1, (-1, sum(scan.widths))).split(scan.widths, dim=-1)
    found = []
    for number, name in enumerate(scan.orders.split(",")):
        of = 0 if scan.shared else number
        bias, A = scan.delta_bias[of] * scan.bias_scale, -scan.A_log[of].exp()
        index, _ = scans.order(name, *grid)
        codes = scans.move_codes(index, grid[1])
        state, out, read = torch.zeros_like(A), {}, 0
        for place, cell in enumerate(index.tolist()):
            if cell not in left:  # a token of zeros
                state = (F.softplus(bias)[:, None] * A).exp() * state
                continue
            token = left.index(cell)
            beside = read if scan.permute == "input" else token
            delta = F.softplus(scan.delta_weight[of] @ steps[beside, of] + bias)
            b = B[beside, of] + (scan.move_B[codes[place]] if scan.moves else 0)
            state = (delta[:, None] * A).exp() * state + (delta * x[token])[:, None] * b
            out[cell] = state @ C[beside, of] + scan.D[of] * x[token]
            read += 1
        found.append(torch.stack([out[cell] for cell in left]))
    return found


def naive_mixer(mixer, x: Tensor, left: list[int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the mixed tokens and the scores of tokens (left, channels)."""
    x = mixer.in_proj(x)
    gated = getattr(mixer, "gate", True)
    x, z = x.chunk(2, dim=-1) if gated else (x, None)
    whole = torch.zeros(grid[0] * grid[1], x.shape[1], dtype=x.dtype)
    whole[left] = x
    whole = mixer.act(mixer.conv(whole.unflatten(0, grid).permute(2, 0, 1)[None]))[0].permute(1, 2, 0).flatten(0, 1)
    outputs = naive_scan(mixer.scan, whole[left], left, grid)
    y = sum(outputs)
    y = mixer.norm(y) if hasattr(mixer, "norm") else y
    y = y * mixer.act(z) if gated else y
    return mixer.proj(y), sum(out.relu().sum(-1) for out in outputs)


def naive_blocks(blocks, x: Tensor, rates) -> tuple[Tensor, list[int]]:
    """Return the whole map (rows, columns, channels) after blocks, and the cells that are left."""
    grid, whole = tuple(x.shape[:2]), x.flatten(0, 1).clone()
    left = list(range(len(whole)))
    for block, rate in zip(blocks, rates, strict=True):
        x = whole[left]
        if len(left) == len(whole) and not hasattr(block, "has_mlp"):
            whole = block(whole.unflatten(0, grid)[None])[0].flatten(0, 1)
            continue
        mixed, scores = naive_mixer(block.mixer, block.norm1(x), left, grid)
        x = x + mixed
        x = x + block.mlp(block.norm2(x)) if block.has_mlp else x
        whole = whole.clone()
        whole[left] = x
        keep = math.ceil(rate * len(left))
        left = sorted(left[token] for token in scores.argsort(descending=True, stable=True)[:keep].tolist())
    return whole.unflatten(0, grid), left


def rates_of(layers, first: int, depth: int, rate: float) -> list[float]:
    return [rate if first + number in layers else 1.0 for number in range(depth)]


@pytest.mark.parametrize("permute", ["input", "all"])
@pytest.mark.parametrize("layers", [[1], [1, 2], [2]])
def test_plainmamba_is_its_definition(layers, permute):
    model = plainmamba(permute=permute)
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.6, layers=layers, trace_source=True)
    with torch.no_grad():
        features, tokens = fast.forward_features(images()), fast.forward_tokens(images())
        for index, image in enumerate(images()):
            x = model.pos_embed(model.stem(image[None]))[0]
            expected, left = naive_blocks(model.blocks, x, rates_of(layers, 0, 3, 0.6))
            torch.testing.assert_close(features[index], model.norm(expected))
            assert tokens.position[index].tolist() == left
        unaligned = reduction.apply(model, "ssm_prune", keep_rate=0.6, layers=layers, align=False)
        assert layers == [2] or not torch.allclose(unaligned.forward_features(images()), features, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vmamba", "test_vmamba_v0"])
@pytest.mark.parametrize("layers", [[0], [2, 3], [0, 2]])
def test_vmamba_is_its_definition(name, layers):
    model = vmamba(name)
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=layers)
    with torch.no_grad():
        maps = fast.forward_intermediates(images(side=48), output_fmt="NHWC", intermediates_only=True)
        for index, image in enumerate(images(side=48)):
            x, first = model.stem(image[None])[0], 0
            for stage, found in zip(model.stages, maps, strict=True):
                x = stage.downsample(x[None])[0]
                x, _ = naive_blocks(stage.blocks, x, rates_of(layers, first, len(stage.blocks), 0.5))
                torch.testing.assert_close(found[index], x)
                first += len(stage.blocks)
        torch.testing.assert_close(fast.forward_features(images(side=48)), model.norm(maps[-1]))


MODELS = {
    "plainmamba": (plainmamba, 64, [1, 2]),
    "vmamba": (vmamba, 48, [0, 2, 3]),
    "vmamba_v0": (lambda: vmamba("test_vmamba_v0"), 48, [0, 3]),
}
EACH = pytest.mark.parametrize("name", MODELS)


def reduced(name: str, rate: float = 0.5) -> tuple[torch.nn.Module, Tensor]:
    make, side, layers = MODELS[name]
    return reduction.apply(make(), "ssm_prune", keep_rate=rate, layers=layers), images(side=side)


@EACH
def test_images_do_not_know_each_other(name):
    fast, x = reduced(name)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), torch.cat([fast(image[None]) for image in x]))


@EACH
def test_keeping_all_is_the_given_model(name):
    fast, x = reduced(name, 1.0)
    with torch.no_grad():
        assert torch.equal(fast(x), reduction.remove(fast)(x))


@EACH
def test_one_token_is_left_where_almost_all_are_to_go(name):
    fast, x = reduced(name, 1e-9)
    assert fast(x).isfinite().all()


@EACH
@pytest.mark.parametrize("size", [(80, 48), (51, 67)])
def test_other_sizes(name, size):
    fast, _ = reduced(name)
    x = torch.randn(1, 3, *size).double()
    given = reduction.remove(fast)
    assert fast.forward_features(x).shape == given.forward_features(x).shape
    maps = fast.forward_intermediates(x, intermediates_only=True)
    assert [each.shape for each in maps] == [
        each.shape for each in given.forward_intermediates(x, intermediates_only=True)
    ]


@EACH
def test_features_only_are_the_maps(name):
    model, layers = timm.create_model(f"test_{name}", features_only=True).eval(), [1, 2]
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=layers)
    x = torch.randn(1, 3, 96, 96)
    whole = reduction.apply(model.model, "ssm_prune", keep_rate=0.5, layers=layers)
    with torch.no_grad():
        maps = whole.forward_intermediates(x, model.feature_info.out_indices, intermediates_only=True)
        for ours, theirs in zip(fast(x), maps, strict=True):
            torch.testing.assert_close(ours, theirs)


@EACH
def test_gradients_flow_repeat_and_are_checkpointed(name):
    fast, x = reduced(name)
    fast.train()
    grads = []
    for checkpointing in (False, False, True):
        fast.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        fast.zero_grad()
        fast(x).square().sum().backward()
        grads.append([value.grad.clone() for value in fast.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads[:2], strict=True))
    for ours, theirs in zip(grads[0], grads[2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(grad.abs().sum() > 0 for grad in grads[0])


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype):
    fast, x = reduced(name)
    with torch.no_grad():
        expected = fast(x)
        half = fast.to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            mixed = fast.float()(x.float())
    assert half.dtype == dtype
    for out in (half, mixed):
        assert out.isfinite().all()
        assert (out.double() - expected).abs().max() < 0.3 * expected.abs().max()  # other tokens may stay


@pytest.mark.parametrize(
    "name", [name if name == "vmamba" else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
def test_compiles_whole(name):
    torch.compiler.reset()
    fast, x = reduced(name)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fast(x))


@pytest.mark.long
@EACH
def test_exports_to_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    fast, x = reduced(name)
    fast, x = fast.float(), x.float()
    with torch.no_grad(), use("reference"):
        torch.onnx.export(fast, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        expected = fast(x)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-5)


@EACH
def test_float32_runs_the_kernels(name):
    fast, x = reduced(name)
    expected = gradients_of(fast, x)
    for ours, theirs in zip(gradients_of(fast.float(), x.float()), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def gradients_of(model, x: Tensor) -> list[Tensor]:
    """Return the logits, and the gradients of the sum of their squares."""
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def test_a_first_block_of_its_own_is_run_as_it_is():
    model = timm.create_model("test_plainmamba").eval()
    fast = reduction.apply(model, "ssm_prune", keep_rate=0.5, layers=[1])
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        maps = [each.forward_intermediates(x, intermediates_only=True) for each in (model, fast)]
    for ours, theirs in zip(maps[1][:2], maps[0][:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    same = (maps[1][2] == maps[1][1]).all(1).flatten(1)
    assert same.sum(1).tolist() == [18]


def pruning(name: str, **options) -> list[int]:
    with torch.device("meta"):
        fast = reduction.apply(timm.create_model(name), "ssm_prune", **options)
    return [index for index, rate in enumerate(fast.reduction.keep_rate) if rate < 1]


def test_default_layers_are_those_of_each_stage():
    assert pruning("plainmamba_l1") == [4, 9, 14]
    assert pruning("plainmamba_l3") == [6, 14, 21]
    assert pruning("vmamba_tiny") == [0, 2, 4, 6, 8, 12]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_an_extractor_without_the_last_stages_prunes_as_the_whole_model_does(kept):
    options = {"depths": (2, 3, 2, 2), "img_size": 64}
    torch.manual_seed(0)
    whole = reduction.apply(timm.create_model("test_vmamba", **options), "ssm_prune", keep_rate=0.5).eval()
    few = timm.create_model("test_vmamba", features_only=True, out_indices=range(kept), **options)
    few = reduction.apply(few, "ssm_prune", keep_rate=0.5).eval()
    few.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, list(range(kept)), intermediates_only=True)
        assert all(torch.equal(*pair) for pair in zip(few(x), expected, strict=True))


def test_an_extractor_of_plainmamba_prunes_as_the_whole_model_does():
    torch.manual_seed(0)
    whole = reduction.apply(timm.create_model("plainmamba_l1", img_size=64), "ssm_prune", keep_rate=0.5)
    few = timm.create_model("plainmamba_l1", features_only=True, out_indices=(5, 10), img_size=64)
    few = reduction.apply(few, "ssm_prune", keep_rate=0.5).eval()
    few.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(x, [5, 10], intermediates_only=True)
        assert all(torch.equal(*pair) for pair in zip(few(x), expected, strict=True))
        assert not torch.equal(few(x)[-1], reduction.remove(few)(x)[-1])


def test_plainmamba_l3_saves_as_many_operations_as_published():
    def flops(model) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
        return counter.get_total_flops()

    with torch.device("meta"):
        model = timm.create_model("plainmamba_l3").eval()
        fast = reduction.apply(model, "ssm_prune", keep_rate=0.635)
        assert abs(1 - flops(fast) / flops(model) - 0.416) < 0.002


def test_what_it_cannot_prune():
    with pytest.raises(TypeError, match=r"a _LocalBlock cannot; give numbers of later blocks"):
        reduction.apply(timm.create_model("test_plainmamba"), "ssm_prune", layers=[0])
    with pytest.raises(ValueError, match=r"released=True.*for Vim alone"):
        reduction.apply(timm.create_model("test_plainmamba"), "ssm_prune", layers=[1], released=True)
    with pytest.raises(TypeError, match=r"a LocalScan cannot.*'cross_scan'"):
        reduction.apply(timm.create_model("test_local_vmamba"), "ssm_prune")
    with pytest.raises(TypeError, match="'tome' reduces models of one resolution"):
        reduction.apply(timm.create_model("test_vmamba"), "tome", r=1)
    with pytest.raises(ValueError, match="depths"):
        reduction.apply(timm.create_model("test_vmamba"), "ssm_prune", depths=[1])

"""Reduced models against their definition, and as models of timm."""

import copy
import pickle

import pytest
import timm
import torch
from naive_reduction import evit, tome
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from visionmix import reduction
from visionmix.backbones import Plain
from visionmix.layers import mlp

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
HOSTS = {
    "vit": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "no_class": {"class_token": False, "global_pool": "avg"},
    "norms": {"qk_norm": True, "init_values": 0.5, "pre_norm": True, "scale_attn_norm": True},
    "average": {"global_pool": "avg", "reg_tokens": 1},
    "map": {"global_pool": "map", "class_token": False},
    "post_norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "distilled": {"distilled": True},
}
METHODS = {
    "tome": {"r": 5},
    "evit": {"keep_rate": 0.6, "layers": [1, 2]},
    "mctf": {"r": 5},
    "ats": {"layers": [1, 2]},
    "algm": {"layers": [0, 2], "threshold": 0.1},
    "avit": {"gate_scale": 0.1, "gate_center": 1.0},
    "zero_tprune": {"layers": [0, 1], "keep_rates": [0.9, 0.6], "similar": 3},
    "dynamicvit": {"keep_rate": 0.6},
}
NEED_A_CLASS_TOKEN = ("evit", "ats", "zero_tprune")
MERGE = ("tome", "mctf", "algm")
BY_IMAGE = ("ats", "algm")  # whose sizes depend on the images


def vit(distilled: bool = False, **options) -> VisionTransformer:
    """Return a small ViT in eval mode with weights that are not small."""
    torch.manual_seed(0)
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**SIZES | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def images(batch: int = 2, size: int | tuple[int, int] = 32) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_removing_no_token_is_the_model_itself(host, fused):
    model = vit(**HOSTS[host], drop_path_rate=0.5, proj_drop_rate=0.2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    fast = reduction.apply(model, "tome", r=0)
    torch.testing.assert_close(fast(images()), model(images()), atol=1e-5, rtol=1e-5)
    model.train()
    fast.train()
    torch.manual_seed(3)
    expected = model(images())
    torch.manual_seed(3)
    torch.testing.assert_close(fast(images()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("host", ["vit", "registers", "no_class", "norms", "average", "distilled"])
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_equals_the_definition(host, method, fused):
    model = vit(**HOSTS[host]).double()
    if method == "evit" and not model.num_prefix_tokens:
        pytest.skip("the class token is what scores")
    for block in model.blocks:
        block.attn.fused_attn = fused
    fast = reduction.apply(model, method, **METHODS[method], trace_source=True)
    x = images().double()
    with torch.no_grad():
        tokens = fast.forward_tokens(x)
        embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for image, start in enumerate(embedded):
            if method == "tome":
                expected, members = tome(model, start, [5] * 4)
            else:
                expected, members = evit(model, start, [1, 0.6, 0.6, 1], fuse=True)
            torch.testing.assert_close(tokens.x[image], model.norm(expected))
            for position, group in enumerate(members):
                cells = [token - model.num_prefix_tokens for token in group if token >= model.num_prefix_tokens]
                assert tokens.source[image, cells].tolist() == [position] * len(cells)
            if method == "tome":
                assert tokens.size[image, :, 0].tolist() == [len(group) for group in members]


@pytest.mark.parametrize("pool", ["avg", "max", "map"])
def test_merged_tokens_count_as_often_as_they_have_cells(pool):
    model = vit(global_pool=pool)
    fast = reduction.apply(model, "tome", r=9, trace_source=True)
    tokens = fast.forward_tokens(images())
    with torch.no_grad():
        torch.testing.assert_close(
            fast(images()), model.forward_head(torch.cat([tokens.prefix(), tokens.cells()], dim=1))
        )
    if pool == "avg":
        weighted = (tokens.x * tokens.size)[:, 1:].sum(1) / tokens.size[:, 1:].sum(1)
        torch.testing.assert_close(fast.forward_head(fast.forward_features(images()), True), model.fc_norm(weighted))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", METHODS)
def test_is_a_model_of_timm(host, method):
    model = vit(**HOSTS[host])
    if method in NEED_A_CLASS_TOKEN and not model.num_prefix_tokens:
        with pytest.raises(ValueError, match="class token"):
            reduction.apply(model, method, **METHODS[method])
        return
    before = model(images())
    fast = reduction.apply(model, method, **METHODS[method])
    assert isinstance(fast, type(model))
    own = [name for name, _ in fast.named_modules() if name.split(".")[0] != "reduction"]
    assert own == [name for name, _ in model.named_modules()]
    assert all(fast.get_parameter(name) is value for name, value in model.named_parameters())
    fast.load_state_dict(model.state_dict(), strict=method != "dynamicvit")  # which has parameters of its own
    assert fast.no_weight_decay() == model.no_weight_decay()
    assert fast.group_matcher() == model.group_matcher()
    assert fast.feature_info == model.feature_info
    out = fast(images())
    assert out.shape == before.shape
    assert not torch.equal(out, before)
    assert torch.equal(model(images()), before)
    assert torch.equal(fast.forward_head(fast.forward_features(images())), out)
    features, maps = fast.forward_intermediates(images(), indices=[1, 3], norm=True)
    assert torch.equal(features, fast.forward_features(images()))
    assert [each.shape for each in maps] == [(2, 32, 8, 8)] * 2
    (nhwc,) = fast.forward_intermediates(images(), [1], norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(nhwc.permute(0, 3, 1, 2), maps[0])
    nlc, prefix = fast.get_intermediate_layers(images(), [3], return_prefix_tokens=True, norm=True)[0], None
    if model.num_prefix_tokens:
        nlc, prefix = nlc
        assert torch.equal(prefix[:, 0], fast.forward_intermediates(images(), [3])[0][:, 0])
    assert torch.equal(nlc.reshape(2, 8, 8, 32).permute(0, 3, 1, 2), maps[1])
    found = fast.forward_intermediates(images(), 1, output_dict=True, return_prefix_tokens=True)
    assert ("image_intermediates_prefix" in found) == (model.num_prefix_tokens > 0)
    assert torch.equal(found["image_features"], fast.forward_features(images()))
    fast.reset_classifier(7)
    assert fast(images()).shape == (2, 7)
    assert model(images()).shape == (2, 5)
    fast.train()
    assert reduction.remove(fast) is model
    assert model.training


@pytest.mark.parametrize("method", [method for method in METHODS if method != "avit"])  # which removes none
def test_untraced_blocks_agree_with_the_maps(method):
    """Before any token goes, a dense map is the model's own; behind, cells of one token share its value."""
    model = vit()
    fast = reduction.apply(model, method, **METHODS[method], trace_source=True)
    if method == "evit":
        torch.testing.assert_close(
            fast.get_intermediate_layers(images(), [0]), model.get_intermediate_layers(images(), [0])
        )
    found = fast.forward_intermediates(images(), [2], output_dict=True, output_fmt="NLC")
    dense, source = found["image_intermediates"][0][0], found["image_source"][0][0]
    assert len(source.unique()) < 64
    for position in source[source >= 0].unique():
        assert len(dense[source == position].unique(dim=0)) == 1


def test_dropped_cells_keep_their_last_value():
    model = vit()
    fast = reduction.apply(model, "evit", keep_rate=0.5, layers=[1, 3], fuse=False, trace_source=True)
    found = fast.forward_intermediates(images(), output_dict=True, output_fmt="NLC", return_prefix_tokens=True)
    dense, source = found["image_intermediates"], found["image_source"]
    assert [(each >= 0).sum(1).tolist() for each in source] == [[64, 64], [32, 32], [32, 32], [16, 16]]
    gone = source[1] < 0
    attended = (
        dense[0]
        + model.blocks[1].attn(
            model.blocks[1].norm1(torch.cat([found["image_intermediates_prefix"][0], dense[0]], dim=1))
        )[:, 1:]
    )
    for behind in dense[1:]:
        torch.testing.assert_close(behind[gone], attended[gone])
    tokens = fast.forward_tokens(images())
    torch.testing.assert_close(tokens.cells()[gone], model.norm(attended[gone]))


@pytest.mark.parametrize("method", METHODS)
def test_trains(method):
    options = {"drop_path_rate": 0.1, "patch_drop_rate": 0.3, "pos_drop_rate": 0.1, "init_values": 0.1}
    fast = reduction.apply(vit(**options), method, **METHODS[method]).train()
    if method == "algm":
        with pytest.raises(ValueError, match="patch_drop_rate=0"):
            fast(images())
        fast = reduction.apply(vit(**options | {"patch_drop_rate": 0.0}), method, **METHODS[method]).train()
    grads = []
    for checkpointing in (False, True, False):
        torch.manual_seed(4)
        fast.set_grad_checkpointing(checkpointing)
        fast.zero_grad()
        fast(images()).square().sum().backward()
        grads.append([value.grad.clone() for value in fast.parameters()])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))
    for a, b in zip(grads[0], grads[1], strict=True):
        torch.testing.assert_close(a, b)
    if method != "algm":
        with pytest.raises(ValueError, match="patch_drop_rate"):
            fast.forward_intermediates(images())


def test_gradients_are_those_of_the_definition():
    model = vit().double()
    fast = reduction.apply(model, "tome", r=7)
    fast.forward_tokens(images(1).double()).x.sin().sum().backward()
    ours = [value.grad.clone() for value in model.blocks.parameters()]
    model.zero_grad()
    start = model._pos_embed(model.patch_embed(images(1).double()))[0]
    model.norm(tome(model, start, [7] * 4)[0]).sin().sum().backward()
    for a, value in zip(ours, model.blocks.parameters(), strict=True):
        torch.testing.assert_close(a, value.grad)


@pytest.mark.parametrize("method", METHODS)
def test_is_copied_and_pickled(method):
    fast = reduction.apply(vit(), method, **METHODS[method])
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(images()), fast(images()))
        assert type(other) is type(fast)
        assert other.cls_token is not fast.cls_token
        assert reduction.remove(other).cls_token is other.cls_token
    again = reduction.apply(reduction.remove(fast), method, **METHODS[method])
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(images()), fast(images()))


@pytest.mark.parametrize("out_indices", [(1, 3), (0,), 2])
def test_features_only(out_indices):
    name, options = "vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "features_only": True}
    model = timm.create_model(name, out_indices=out_indices, **options)
    fast = reduction.apply(model, "tome", r=3)
    assert [each.shape for each in fast(images(2, 64))] == [each.shape for each in model(images(2, 64))]
    assert fast.feature_info.channels() == model.feature_info.channels()
    assert list(fast.state_dict()) == list(model.state_dict())
    assert not torch.equal(fast(images(2, 64))[-1], model(images(2, 64))[-1])
    assert reduction.remove(fast) is model
    with pytest.raises(ValueError, match="remove"):
        reduction.apply(fast, "tome", r=3)


@pytest.mark.parametrize("method", METHODS)
def test_an_extractor_without_the_last_blocks_reduces_as_the_whole_model_does(method):
    """Schedules go by the whole model's depth, and nothing is left that only later blocks need."""
    options = {} if method in ("evit", "ats", "dynamicvit", "zero_tprune", "algm") else METHODS[method]
    if method == "tome":
        options = {"r": (5, -1.0)}
    torch.manual_seed(0)
    whole = timm.create_model("vit_tiny_patch16_224", **SIZES | {"depth": 8})
    features = timm.create_model(
        "vit_tiny_patch16_224", **SIZES | {"depth": 8}, features_only=True, out_indices=(1, 4)
    ).eval()
    fast = reduction.apply(whole, method, **options).eval()
    few = reduction.apply(features, method, **options)
    assert len(few.model.blocks) == 5
    few.load_state_dict({f"model.{key}": value for key, value in fast.state_dict().items()}, strict=False)
    expected = fast.forward_intermediates(images(), [1, 4], intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(few(images()), expected, strict=True))
    few.train()
    sum(each.square().sum() for each in few(images())).backward()
    assert [name for name, value in few.named_parameters() if value.grad is None] == []
    fast.prune_intermediate_layers([1, 4])
    assert fast.state_dict().keys() == few.model.state_dict().keys() | {"norm.weight", "norm.bias"}
    again = fast.forward_intermediates(images(), [1, 4], intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_numbers_of_blocks_may_be_those_of_blocks_that_an_extractor_leaves_off():
    features = timm.create_model("vit_tiny_patch16_224", **SIZES, features_only=True, out_indices=(1,))
    assert reduction.apply(features, "evit", layers=[1, 3]).model.reduction.keep_rate == (1, 0.7, 1, 0.7)
    with pytest.raises(ValueError, match=r"layers=\[4\]: give different block numbers from 0 to 3"):
        reduction.apply(features, "evit", layers=[4])
    with pytest.raises(ValueError, match="reduced already, by evit"):
        reduction.apply(reduction.apply(features, "evit"), "tome", r=2)
    pruned = timm.create_model("test_dynamicvit", features_only=True, out_indices=(1,))
    assert len(pruned.model.reduction.predictors) == 1
    with pytest.raises(ValueError, match="reduced already, by dynamicvit"):
        reduction.apply(pruned, "tome", r=2)


def test_other_sizes_and_the_given_model():
    model = vit(dynamic_img_size=True)
    fast = reduction.apply(model, "tome", r=5)
    assert fast.forward_intermediates(images(1, (24, 40)), 1)[1][0].shape == (1, 32, 6, 10)
    model = vit()
    fast = reduction.apply(model, "tome", r=5)
    fast.set_input_size((24, 40))
    assert fast.forward_intermediates(images(1, (24, 40)), 1)[1][0].shape == (1, 32, 6, 10)
    assert model(images()).shape == (2, 5)


def test_tokens_never_run_out():
    fast = reduction.apply(vit(), "tome", r=1000)
    assert fast.forward_features(images()).shape == (2, 5, 32)
    assert reduction.apply(vit(), "evit", keep_rate=0.001)(images()).isfinite().all()
    assert reduction.apply(vit(), "mctf", r=1000).forward_features(images()).shape == (2, 10, 32)
    assert reduction.apply(vit(), "mctf_fast", r=0.99)(images(7)).isfinite().all()
    few = {"keep_rates": [0.001] * 4, "layers": range(4), "similar": 1000}
    assert reduction.apply(vit(), "zero_tprune", **few)(images(1)).isfinite().all()
    assert reduction.apply(vit(), "dynamicvit", keep_rate=0.001)(images()).isfinite().all()
    assert reduction.apply(vit(), "algm", threshold=-1.0, layers=range(4))(images(1)).isfinite().all()
    assert reduction.apply(vit(), "ats", samples=2, layers=range(4))(images(7)).isfinite().all()


# More than there is to take away.
EXTREME = {
    "tome": {"r": 10**9},
    "evit": {"keep_rate": 1e-9, "layers": [0, 1, 2, 3]},
    "mctf": {"r": 10**9},
    "ats": {"layers": [0, 1, 2, 3], "samples": 10**9},
    "algm": {"threshold": -1.0, "layers": [0, 1, 2, 3], "window_size": 10**9},
    "avit": {"gate_scale": 1e6, "gate_center": 0},
    "zero_tprune": {"layers": [0, 1, 2, 3], "keep_rates": 1e-9, "similar": 10**9},
    "dynamicvit": {"keep_rate": 1e-9},
}


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (12, 20)])
@pytest.mark.parametrize("host", ["vit", "average", "no_class"])
@pytest.mark.parametrize("method", EXTREME)
def test_something_is_left_of_maps_of_one_cell_and_more(method, host, size):
    """Heads that pool over cells find at least one, and all that is computed is finite."""
    model = vit(**HOSTS[host], img_size=size)
    if method in NEED_A_CLASS_TOKEN and not model.num_prefix_tokens:
        return
    fast = reduction.apply(model, method, **EXTREME[method])
    for batch in (1, 7):
        x = images(batch, size)
        with torch.no_grad():
            logits, maps = fast.eval()(x), fast.forward_intermediates(x, intermediates_only=True)
        assert all(value.isfinite().all() for value in (logits, *maps))
        out, losses = fast.train().forward_train(x) if fast.reduction.has_losses else (fast.train()(x), {})
        (out.sum() + sum(losses.values())).backward()
        assert all(value.isfinite() for value in losses.values())
        assert all(value.grad.isfinite().all() for value in fast.parameters() if value.grad is not None)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_no_images(method):
    fast = reduction.apply(vit(), method, **METHODS[method])
    assert fast(images(0)).shape == (0, 5)
    assert fast.forward_intermediates(images(0), 1, intermediates_only=True)[0].shape == (0, 32, 8, 8)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_see_each_other(method, batch):
    fast = reduction.apply(vit(), method, **METHODS[method])
    with torch.no_grad():
        together, alone = fast(images(batch)), [fast(image.unsqueeze(0)) for image in images(batch)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_finite(method, dtype):
    fast = reduction.apply(vit(), method, **METHODS[method])
    with torch.autocast("cpu", dtype=dtype):
        assert fast(images()).isfinite().all()
    assert fast.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "host"),
    [
        # Each takes seconds: one that merges and one that drops are tried in the quick suite.
        *((method, "vit") for method in ("mctf", "evit")),
        *(
            pytest.param(method, "vit", marks=pytest.mark.long)
            for method in METHODS
            if method not in ("mctf", "evit", *BY_IMAGE)
        ),
        *(pytest.param("tome", host, marks=pytest.mark.long) for host in HOSTS if host != "vit"),
    ],
)
def test_exports_and_compiles_whole(method, host):
    fast = reduction.apply(vit(**HOSTS[host], depth=3), method, **METHODS[method])
    torch.compiler.reset()  # graphs of other cases count towards the limit of recompilations
    program = torch.export.export(fast, (images(),))
    torch.testing.assert_close(program.module()(images()), fast(images()))
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), fast(images()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("method", "options"), [*METHODS.items(), ("evit", {"keep_rate": 0.6, "layers": [1, 2, 3]}), ("mctf", {"r": 0.6})]
)
def test_a_trace_has_as_many_tokens(method, options):
    """Of 40 tokens 0.6 are 24, but 24.000001 in float32, as a trace reckons with sizes."""
    fast = reduction.apply(vit(), method, **options)
    with torch.no_grad():
        traced = torch.jit.trace(fast, images(), check_trace=False)
        other = images() if method in BY_IMAGE else images(2).flip(3)
        torch.testing.assert_close(traced(other), fast(other))


@pytest.mark.long
@pytest.mark.parametrize("method", [method for method in METHODS if method not in BY_IMAGE])
def test_compiles_by_inductor(method):
    fast = reduction.apply(vit(depth=3), method, **METHODS[method])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fast, fullgraph=True)(images()), fast(images()), atol=1e-4, rtol=1e-4)


def plain(mixer=None, **options) -> Plain:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}
    mixer = mixer or {"name": "softmax", "gate": True}
    model = Plain(**sizes, mixer=mixer, mlp_layer=mlp, layer_scale=0.5, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_reduces_a_plain_model():
    model = plain(drop_path_rate=0.1)
    torch.testing.assert_close(reduction.apply(model, "tome", r=0)(images()), model(images()))
    fast = reduction.apply(model, "tome", r=9, trace_source=True)
    features, maps = fast.forward_intermediates(images(), output_fmt="NHWC")
    assert [len(each.reshape(-1, 32).unique(dim=0)) for each in maps] == [2 * (64 - 9 * n) for n in (1, 2, 3)]
    assert torch.equal(features, fast.forward_features(images()))
    assert torch.equal(features, model.norm(maps[-1]))
    tokens = fast.forward_tokens(images())
    pooled = (tokens.x * tokens.size).sum(1) / tokens.size.sum(1)
    torch.testing.assert_close(fast.forward_head(features, pre_logits=True), pooled)
    fast.train()(images()).sum().backward()
    assert reduction.remove(fast) is model


def test_a_normalised_gate_is_reduced_too():
    model = plain({"name": "softmax", "gate": True, "gate_norm": True})
    torch.testing.assert_close(reduction.apply(model, "tome", r=0)(images()), model(images()))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("method", METHODS)
def test_reduces_a_plain_model_with_a_class_token(method, pool):
    model = plain(prefix_tokens="first", global_pool=pool)
    torch.testing.assert_close(reduction.apply(model, "evit", keep_rate=1.0)(images()), model(images()))
    fast = reduction.apply(model, method, **METHODS[method], trace_source=True)
    assert torch.equal(fast.forward_head(fast.forward_features(images())), fast(images()))
    features, pairs = fast.forward_intermediates(images(), return_prefix_tokens=True, norm=True)
    assert torch.equal(features, fast.forward_features(images()))
    assert [(each.shape, prefix.shape) for each, prefix in pairs] == [((2, 32, 8, 8), (2, 1, 32))] * 3
    tokens = fast.forward_tokens(images())
    if method in MERGE:
        assert tokens.size[:, 0].tolist() == [[1.0], [1.0]]
        assert tokens.size.sum(1).tolist() == [[65.0], [65.0]]
    dense = method == "avit" or (method in (*MERGE, "ats") and pool == "avg")
    assert (features.shape[1] == 65) == dense
    assert tokens.source.unique()[-1] < tokens.x.shape[1]
    assert 0 not in tokens.source


def test_a_class_token_in_the_middle_is_refused():
    with pytest.raises(ValueError, match="prefix tokens first"):
        reduction.apply(plain(prefix_tokens="middle", global_pool="token"), "tome", r=2)


@pytest.mark.long
def test_a_reduced_plain_model_exports_and_compiles_whole():
    torch.compiler.reset()
    fast = reduction.apply(plain(), "tome", r=9)
    torch.testing.assert_close(torch.export.export(fast, (images(),)).module()(images()), fast(images()))
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), fast(images()))

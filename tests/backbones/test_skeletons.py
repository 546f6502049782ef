"""The places that the skeletons offer: blocks, stages, norms, prefix tokens, layers by name."""

import contextlib
import math
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim
from torch.fx import symbolic_trace

import visionmix
from visionmix.backbones import Block, Hierarchical, Parallel, Plain, Residual, Stage, TokenBlock
from visionmix.layers import BatchNorm, ConvMlp, ConvPosition, PrefixTokens, join_prefix, prefix_positions, split_prefix
from visionmix.layers.by_name import layer_maker
from visionmix.models import list_family_models

TINY = {"img_size": 64, "num_classes": 10, "mixer": "conv", "mlp_layer": "mlp"}
PYRAMID = {**TINY, "embed_dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1)}
PLAIN = {**TINY, "embed_dim": 16, "depth": 3, "patch_size": 8}


def images(height=64, width=96, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# Models that show a place each
PLACES = {}


def place(make):
    PLACES[make.__name__] = make
    return make


def seeded(name):
    torch.manual_seed(0)
    return PLACES[name]().eval()


def export(model):
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    return torch.export.export(model, (images(),), dynamic_shapes=(axes,)).module()


GRAPHS = {
    "script": torch.jit.script,
    "fx": symbolic_trace,
    "export": export,
    "compile": partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager"),
}


@pytest.mark.parametrize("name", ["carrying", "map_layers", "prefix_evenly", "prefix_passing"])
@pytest.mark.parametrize("graph", [
    "script", "fx", pytest.param("export", marks=pytest.mark.long), pytest.param("compile", marks=pytest.mark.long)
])  # fmt: skip
def test_one_graph_of_a_place_serves_all_sizes(graph, name):
    model = seeded(name)
    made = GRAPHS[graph](model)
    with torch.no_grad() if graph == "script" else contextlib.nullcontext():  # compiling for gradients takes long
        for size in ((64, 96), (96, 64)):
            assert torch.allclose(made(images(*size)), model(images(*size)), atol=1e-5)


# Heads, where a caller gives none


@pytest.mark.parametrize("dim", [1, 8, 16, 36, 48, 66, 96, 100, 128, 160, 448, 512, 1000])
def test_heads_are_about_32_channels_wide(dim):
    heads = visionmix.backbones.contract.heads_for(dim)
    width = dim // heads
    assert heads * width == dim
    if dim % 4 == 0:
        assert width % 4 == 0
        nearest = min((w for w in range(4, dim + 1, 4) if dim % w == 0), key=lambda w: abs(math.log(w / 32)))
        assert width == nearest


@pytest.mark.parametrize("mixer", visionmix.list_mixers())
def test_any_mixer_in_any_skeleton(mixer):
    """At every width of the models whose own table gives no heads: one stage a width, all in one model."""
    widths = set()
    for name in ("vmamba_base", "msvmamba_micro", "msvmamba_nano", "efficient_vmamba_small", "plainmamba_l3"):
        sizes = visionmix.models.family.variant_of(name).layout.options
        widths.update(sizes.get("embed_dims") or [sizes["embed_dim"]])
    model = Hierarchical(embed_dims=sorted(widths), depths=[1] * len(widths), mixer=mixer, device="meta")
    assert [stage.blocks[0].norm1.normalized_shape[0] for stage in model.stages] == sorted(widths)
    assert list(Plain(embed_dim=sizes["embed_dim"], depth=1, mixer=mixer, device="meta").parameters())


# Lists, one entry a block or a stage


def mixers_of(blocks):
    return [type(block.mixer).__name__ for block in blocks]


@pytest.mark.parametrize("count", [2, 4, 5])
def test_a_list_of_mixers_has_one_entry_a_block(count):
    with pytest.raises(ValueError, match=f"mixer has {count} entries for the 3 blocks"):
        Plain(**PLAIN | {"mixer": ["conv"] * count})
    with pytest.raises(ValueError, match=r"mixer has 3 entries for the 2 blocks of stage 1"):
        Hierarchical(**PYRAMID | {"mixer": ["conv", ["conv"] * 3, "conv", "conv"]})
    with pytest.raises(ValueError, match=r"block_layer has 2 entries for the 3 blocks"):
        Plain(**PLAIN, block_layer=[Block, Block])


def test_a_cycle_goes_through_its_entries_in_turn():
    model = Plain(**PLAIN | {"mixer": {"cycle": ["conv", "softmax"]}})
    assert mixers_of(model.blocks) == [type(model.blocks[index].mixer).__name__ for index in (0, 1, 0)]
    assert len(set(mixers_of(model.blocks))) == 2
    with pytest.raises(ValueError, match="no entries"):
        Plain(**PLAIN | {"mixer": {"cycle": []}})


def test_layers_differ_by_stage():
    model = Hierarchical(
        **PYRAMID | {"mlp_layer": ["mlp", None, "conv_mlp", "swiglu"]},
        norm_layer=["layernorm", "rmsnorm", "batchnorm", {"name": "layernorm", "eps": 0.5}],
        stage_norm_layer=[None, "same", "rmsnorm", None],
        downsample_layer=[None, "conv", {"name": "conv", "kernel_size": 2}, "patch_merging"],
        final_norm_layer="rmsnorm",
        block_layer=[Block, [Block, NoNorm], Block, Block],
    )
    assert [type(stage.norm).__name__ for stage in model.stages] == ["Identity", "RmsNorm", "RmsNorm", "Identity"]
    norms = [type(stage.blocks[0].norm1).__name__ for stage in model.stages]
    assert norms == ["LayerNorm", "RmsNorm", "BatchNorm", "LayerNorm"]
    assert model.stages[3].blocks[0].norm1.eps == 0.5
    assert type(model.norm).__name__ == "RmsNorm"
    assert not model.stages[1].blocks[0].has_mlp
    assert model.stages[2].downsample.conv.kernel_size == (2, 2)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert torch.jit.script(model.eval())(images()).shape == (2, 10)


class NoNorm(nn.Module):
    """A block that hands its mixer the input as it is, and norms the branch behind it."""

    def __init__(self, dim, *, mixer, norm_layer, drop_path, layer_scale, device, dtype, **others):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.mixer, self.other = mixer(), mixer(kernel_size=5)
        self.norm = norm_layer(dim, **dd)
        self.scale1 = Residual(dim, drop_path, 0.5, **dd)

    def forward(self, x):
        return self.scale1(x, self.norm(self.mixer(x) + self.other(x)))


def test_strides_are_read_from_the_layers():
    class Third(nn.Module):
        stride = 3

        def __init__(self, dim, out_dim, device=None, dtype=None):
            super().__init__()
            self.conv = nn.Conv2d(dim, out_dim, 3, 3, padding=1, device=device, dtype=dtype)

        def grid_size(self, height, width):
            return (height + 2) // 3, (width + 2) // 3

        def forward(self, x):
            return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    model = Hierarchical(**PYRAMID, downsample_layer=["conv", "conv", Third, "conv"], stem_layer="patch")
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 24, 48]
    maps = model.forward_intermediates(images(96, 96), intermediates_only=True)
    assert [each.shape[-1] for each in maps] == [24, 12, 4, 2]
    assert Plain(**PLAIN, stem_layer="patch", stride=4).feature_info[0]["reduction"] == 4


# Tensors that stages carry


class GlobalTokens(Stage):
    """A stage whose maps read a token left by the stage before, and leave one for the next."""

    def forward(self, x: torch.Tensor, carry: list[torch.Tensor]) -> torch.Tensor:
        x = self.pos_embed(self.downsample(x))
        if len(carry) > 0:
            x = x + carry[0].mean()
        for block in self.blocks:
            x = block(x)
        carry.append(x.mean(dim=[1, 2]))
        if len(carry) > 1:
            carry[0] = carry[0] * 2
        return self.norm(x)


@place
def carrying():
    return Hierarchical(**PYRAMID, stage_layer=[GlobalTokens, GlobalTokens, Stage, GlobalTokens])


def test_stages_carry_tensors_to_later_ones():
    model = seeded("carrying")
    x, carried = model.stem(images()), torch.zeros(())
    first, second, third, fourth = model.stages
    x = first(x, [])
    carried = x.mean(dim=[1, 2]).mean()
    x = third(second.norm(second.blocks[1](second.blocks[0](second.downsample(x) + carried))))
    x = fourth.norm(fourth.blocks[0](fourth.downsample(x) + 2 * carried))
    assert torch.allclose(model.forward_features(images()), model.norm(x), atol=1e-6)
    final, _ = model.forward_intermediates(images())
    assert torch.allclose(final, model.norm(x), atol=1e-6)


# Feed-forwards and position encodings of plain models


@place
def map_layers():
    return Plain(**PLAIN | {"mlp_layer": "conv_mlp"}, block_layer=partial(Block, pos_layer=ConvPosition))


def test_plain_models_take_layers_that_read_maps():
    model = seeded("map_layers")
    x = model.pos_embed(model.stem(images()))
    for block in model.blocks:
        x = x + block.pos(x)
        x = x + block.mixer(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    assert torch.allclose(model.forward_features(images()), model.norm(x), atol=1e-6)


def test_position_encodings_beside_prefix_tokens_are_made_from_the_cells():
    torch.manual_seed(0)
    options = {"prefix_tokens": {"count": 2, "place": "last"}, "mixer": "softmax"}
    model = Plain(**PLAIN | options, block_layer=partial(TokenBlock, pos_layer=ConvPosition)).eval()
    x, grid = model.embed(images())
    block = model.blocks[0]
    cells, prefix = split_prefix(x, grid.prefix_positions)
    cells = cells.unflatten(1, (8, 12))
    x = torch.cat([(cells + block.pos(cells)).flatten(1, 2), prefix], dim=1)
    x = x + block.mixer.forward_tokens(block.norm1(x), grid)
    x = x + block.mlp(block.norm2(x))
    assert torch.allclose(block(model.embed(images())[0], grid), x, atol=1e-6)


def test_feed_forwards_that_read_maps_are_refused_beside_prefix_tokens():
    with pytest.raises(ValueError, match="ConvMlp, which reads whole maps"):
        Plain(**PLAIN | {"mlp_layer": ConvMlp, "mixer": "softmax"}, prefix_tokens="first")


# Prefix tokens


@pytest.mark.parametrize(("count", "place", "expected"), [
    (1, "first", [0]), (3, "first", [0, 1, 2]), (1, "middle", [7]), (2, "middle", [7, 8]), (2, "last", [15, 16]),
    (1, "evenly", [7]), (4, "evenly", [3, 7, 11, 15]),
])  # fmt: skip
def test_places_of_prefix_tokens(count, place, expected):
    assert prefix_positions(15, count, place) == expected
    layer = PrefixTokens(4, count, place)
    x = torch.randn(2, 15, 4)
    cells, prefix = split_prefix(layer(x), expected)
    assert torch.equal(cells, x)
    assert torch.equal(prefix[1], (layer.weight + layer.pos_embed)[0])
    assert torch.equal(join_prefix(cells, prefix, expected), layer(x))


def test_prefix_tokens_without_positions():
    tokens = {"count": 2, "place": "last", "positioned": False}
    model = Plain(**PLAIN | {"mixer": "softmax", "prefix_tokens": tokens, "global_pool": "token"})
    assert {key for key, _ in model.class_token.named_parameters()} == {"weight"}
    tokens, grid = model.embed(images())
    assert grid.prefix_positions == [96, 97]
    assert torch.equal(tokens[1, 96:], model.class_token.weight[0])
    assert model.class_token.weight.abs().sum() > 0  # drawn, like those that have positions


@pytest.mark.parametrize("place", ["first", "middle", "last", "evenly"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mixer", ["softmax", "bidirectional_mamba", "agent"])
def test_prefix_tokens_anywhere(mixer, count, place):
    torch.manual_seed(0)
    options = {"mixer": mixer, "prefix_tokens": {"count": count, "place": place}, "global_pool": "token"}
    model = Plain(**PLAIN | options).eval()
    features = model.forward_features(images())
    assert features.shape == (2, 8 * 12 + count, 16)
    at = prefix_positions(96, count, place)
    assert torch.allclose(model(images()), model.head.fc(features[:, at[0]]), atol=1e-6)
    for pool, reduce in {
        "avg": lambda cells: cells.mean(1),
        "max": lambda cells: cells.amax(1),
        "avgmax": lambda cells: (cells.amax(1) + cells.mean(1)) / 2,
    }.items():
        model.reset_classifier(5, pool)
        assert torch.allclose(model(images()), model.head.fc(reduce(split_prefix(features, at)[0])), atol=1e-6)
    (cells, prefix), *_ = model.forward_intermediates(
        images(), 1, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    assert torch.allclose(join_prefix(cells, prefix, at), features, atol=1e-6)


@place
def prefix_evenly():
    options = {"mixer": "softmax", "prefix_tokens": {"count": 3, "place": "evenly"}, "global_pool": "token"}
    return Plain(**PLAIN | options)


@place
def prefix_passing():
    return Plain(**PLAIN, prefix_tokens={"count": 2, "place": "middle"}, prefix="pass", global_pool="token")


def test_prefix_tokens_pass_mixers_of_maps():
    model = seeded("prefix_passing")
    x, grid = model.embed(images())
    block, at = model.blocks[0], grid.prefix_positions
    cells, _ = split_prefix(block.norm1(x), at)
    mixed = block.mixer(cells.unflatten(1, (8, 12))).flatten(1, 2)
    expected = x + join_prefix(mixed, torch.zeros(2, 2, 16), at)
    expected = expected + block.mlp(block.norm2(expected))
    assert torch.allclose(block(x, grid), expected, atol=1e-6)
    with pytest.raises(ValueError, match="prefix='pass'"):
        Plain(**PLAIN, prefix_tokens="first")
    with pytest.raises(ValueError, match="prefix='skip' is unknown"):
        Plain(**PLAIN, prefix="skip")


@pytest.mark.parametrize(("options", "message"), [
    ({"prefix_tokens": "front"}, "place='front'"),
    ({"prefix_tokens": {"count": 0}}, "count=0"),
    ({"prefix_tokens": "first", "global_pool": "fast"}, "global_pool='fast'"),
])  # fmt: skip
def test_prefix_tokens_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Plain(**PLAIN | {"mixer": "softmax"} | options)


# Layers by name


def test_a_recipe_rebuilds_its_model():
    """Names and dicts of plain values, as they stand in YAML, say the whole model."""
    options = {
        "mixer": [{"name": "na", "kernel_size": 3}, "mala", {"cycle": ["softmax"]}, "conv"],
        "stem_layer": {"name": "conv", "act_layer": "relu", "norm_layer": "rmsnorm"},
        "downsample_layer": {"name": "patch_merging", "norm_layer": "rms_norm"},
        "mlp_layer": {"name": "mlp", "act_layer": "silu", "mlp_ratio": 2.0},
        "norm_layer": "batchnorm",
        "pos_embed": [{"name": "learned", "mode": "bilinear"}, None, None, None],
        "head_layer": {"name": "projection", "hidden_size": 20},
    }
    model = Hierarchical(**PYRAMID | options).eval()
    assert type(model.stem.act1).__name__ == "ReLU"
    assert type(model.stem.norm1).__name__ == type(model.stages[1].downsample.norm).__name__ == "RmsNorm"
    assert type(model.stages[0].blocks[0].mlp.act).__name__ == "SiLU"
    assert model.stages[0].blocks[0].mlp.fc1.out_features == 16
    assert isinstance(model.norm, BatchNorm)
    assert model.stages[0].pos_embed.mode == "bilinear"
    assert model.head_hidden_size == 20
    assert model(images()).shape == (2, 10)


@pytest.mark.parametrize(("option", "value", "message"), [
    ("mlp_layer", "swiglou", "did you mean 'swiglu'"),
    ("mlp_layer", {"name": "mlp", "mlp_ration": 3}, "did you mean 'mlp_ratio'"),
    ("mlp_layer", {"mlp_ratio": 3}, "has no 'name'"),
    ("norm_layer", "layernrm", "did you mean 'layernorm'"),
    ("stage_norm_layer", "layernrm", "stage_norm_layer='layernrm'"),
    ("stem_layer", {"name": "conv", "act_layer": "rellu"}, r"stem_layer.act_layer='rellu'.*did you mean 'relu"),
    ("pos_embed", "sine", "pos_embed='sine'"),
    ("downsample_layer", ["conv"] * 3, "3 entries for 4 stages"),
    ("head_layer", "pol", "did you mean 'pool'"),
])  # fmt: skip
def test_layers_that_nobody_knows(option, value, message):
    with pytest.raises(ValueError, match=message):
        Hierarchical(**PYRAMID | {option: value})
    with pytest.raises(TypeError, match="norm_layer=3 is not a layer"):
        layer_maker("norm_layer", 3)


@pytest.mark.parametrize("name", ["test_plain", "test_pyramid"])
@pytest.mark.parametrize(("size", "error", "message"), [
    (3, ValueError, "img_size=3 is smaller than patch_size="),
    ((64, -3), ValueError, r"img_size=\(64, -3\) is smaller than patch_size="),
    ((64, 64, 3), ValueError, r"img_size=\(64, 64, 3\) has 3 sides; give an integer, or \(height, width\)"),
    ([], ValueError, r"img_size=\[\] has 0 sides"),
    ("64", TypeError, "img_size='64' is not a size in pixels"),
    (64.0, TypeError, r"img_size=64\.0 is not a size in pixels"),
    ((64, None), TypeError, r"img_size=\(64, None\) is not a size in pixels"),
])  # fmt: skip
def test_other_values_than_sizes_of_images_are_refused(name, size, error, message):
    model = timm.create_model(name)
    for build in (type(model), partial(timm.create_model, name)):
        with pytest.raises(error, match=message):
            build(img_size=size)
    cfg = model.pretrained_cfg
    with pytest.raises(error, match=message):
        model.set_input_size(size)
    assert model.pretrained_cfg is cfg


def test_old_and_new_models_have_no_hidden_options():
    """Every registered tiny model is rebuilt by its table's options alone, on the meta device."""
    for name in list_family_models():
        if name.startswith("test_"):
            with torch.device("meta"):
                assert isinstance(timm.create_model(name, device="meta"), Hierarchical | Parallel | Plain)


# The piece of blocks


@pytest.mark.parametrize("scale", [None, 0.25])
def test_residual_adds_a_branch(scale):
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    layer = Residual(4, layer_scale=scale)
    assert torch.allclose(layer(x, y), x + (scale or 1.0) * y)
    assert [name for name, _ in layer.named_parameters()] == ([] if scale is None else ["gamma"])
    dropped = Residual(4, drop_path=0.999999, layer_scale=scale).train()
    assert torch.equal(dropped(x, y), x)


def test_layer_scales_start_on_the_meta_device():
    model = Plain(**PLAIN, layer_scale=0.1, device="meta").to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(model.blocks[0].scale1.gamma, torch.full((16,), 0.1))

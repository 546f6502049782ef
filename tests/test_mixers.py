"""Mixers by name, and in any place of a skeleton."""

from typing import get_args

import pytest
import timm
import torch
from torch import nn

import visionmix
from visionmix import mixers
from visionmix.mixers.registry import mixer_named, mixer_options


def test_created_by_name():
    mixer = visionmix.create_mixer("gated_linear_attention", 24, num_heads=2)
    assert mixer(torch.randn(2, 3, 5, 24)).shape == (2, 3, 5, 24)
    assert "gated_linear_attention" in visionmix.list_mixers()


@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_every_mixer_on_any_grid(name):
    mixer = visionmix.create_mixer(name, 24)
    for grid in [(1, 1), (1, 7), (5, 1), (6, 9)]:
        x = torch.randn(2, *grid, 24, requires_grad=True)
        out = mixer(x)
        assert out.shape == x.shape
        out.sum().backward()
        assert torch.isfinite(x.grad).all(), grid


@pytest.mark.parametrize("skeleton", ["test_pyramid", "test_plain"])
@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_every_mixer_in_every_skeleton(name, skeleton):
    model = timm.create_model(skeleton, mixer=name, num_classes=3)
    out = model(torch.randn(2, 3, 72, 100))
    assert out.shape == (2, 3)
    out.sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_every_mixer_in_a_trace(name):
    mixer = visionmix.create_mixer(name, 24).eval()
    with visionmix.kernels.use("reference"), torch.no_grad():
        traced = torch.jit.trace(mixer, torch.randn(2, 9, 11, 24), check_trace=False)
        x = torch.randn(2, 9, 11, 24)
        assert torch.allclose(traced(x), mixer(x), atol=1e-5)


@pytest.mark.parametrize("order", ["hilbert", "snake", "window_3"])
@pytest.mark.parametrize("name", [n for n in visionmix.list_mixers() if "order" in mixer_options(n)])
def test_scanning_mixers_take_any_order(name, order):
    mixer = visionmix.create_mixer(name, 24, order=order)
    assert mixer(torch.randn(1, 5, 7, 24)).shape == (1, 5, 7, 24)
    with pytest.raises(ValueError, match="hilbrt"):
        visionmix.create_mixer(name, 24, order="hilbrt")


def test_the_mixers_that_scan():
    scanning = {n for n in visionmix.list_mixers() if "order" in mixer_options(n)}
    named = {n for n in visionmix.list_mixers() if {"scan", "mamba", "gated"} & set(n.split("_"))}
    assert named - scanning == {"dual_gated"}  # attention, with gates


def test_a_mixer_of_maps_is_refused_beside_a_class_token():
    options = {"mixer": "conv", "prefix_tokens": "first", "global_pool": "token"}
    with pytest.raises(ValueError, match="DepthwiseConv reads whole maps and cannot serve beside prefix tokens"):
        timm.create_model("test_plain", **options)
    with pytest.raises(ValueError, match="LinearAttention reads whole maps"):
        timm.create_model("test_plain", **options | {"mixer": {"name": "linear", "lepe": 3}})


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gated_linear_attention'"):
        visionmix.create_mixer("gated_linear_atention", 24)
    with pytest.raises(ValueError, match=r"num_head=3 \(did you mean 'num_heads'"):
        visionmix.create_mixer("gated_linear_attention", 24, num_head=3)
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=24"):
        visionmix.create_mixer("gated_linear_attention", 24, num_heads=5)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="is taken"):
        visionmix.mixers.register_mixer("gated_linear_attention")(nn.Identity)


def test_models_take_mixers():
    spec = {"name": "gated_linear_attention", "gate_rank": 8}
    plain = timm.create_model("test_vig", mixer={"cycle": ["gated_linear_attention", spec]})
    assert [block.mixer.gate_down.out_features for block in plain.blocks] == [16, 8, 16]
    stages = timm.create_model("test_vig_h", mixer=[spec, spec, ["gated_linear_attention", spec], spec])
    assert [block.mixer.gate_down.out_features for block in stages.stages[2].blocks] == [16, 8]
    with pytest.raises(ValueError, match="unknown mixer='nothing'"):
        timm.create_model("test_vig", mixer="nothing")
    with pytest.raises(ValueError, match="3 entries for 4 stages"):
        timm.create_model("test_vig_h", mixer=[spec] * 3)
    with pytest.raises(TypeError, match="mixer=3 is not a mixer"):
        timm.create_model("test_vig", mixer=3)
    with pytest.raises(ValueError, match="has no 'name'"):
        timm.create_model("test_vig", mixer={"gate_rank": 8})


@pytest.mark.parametrize("model", ["test_vig", "test_vig_h", "test_hrvmamba"])
@pytest.mark.parametrize(
    ("mixer", "error", "said"),
    [
        (["softmax", 3], TypeError, "mixer=3 is not a mixer"),
        ([[["softmax"]]], TypeError, r"mixer=\[.*\] is a list where one mixer is wanted"),
        ({"cycle": [["softmax"]]}, TypeError, r"mixer=\['softmax'\] is a list where one mixer is wanted"),
        ({"cycle": [3]}, TypeError, "mixer=3 is not a mixer"),
        ({"cycle": "softmax"}, ValueError, "has no entries to go through"),
        ({"name": ["softmax"]}, TypeError, r"mixer=\['softmax'\] is no name"),
        ({"name": 3}, TypeError, "mixer=3 is no name"),
        ({"name": "softmax", "dim": 8}, ValueError, "the model sets dim"),
        ({"name": "softmax", "dtype": "float16"}, ValueError, "the model sets dtype"),
    ],
)
def test_mixers_of_no_use_are_named(model, mixer, error, said):
    with pytest.raises(error, match=said):
        timm.create_model(model, mixer=mixer)


@pytest.mark.parametrize("name", [n for n in visionmix.list_mixers() if "dt_rank" in mixer_options(n)])
def test_scans_size_themselves_by_the_width(name):
    mixer = visionmix.create_mixer(name, 40, expand=0.5)
    sizes = {tuple(value.shape[-2:]) for key, value in mixer.named_parameters() if key.endswith("delta_weight")}
    assert sizes == {(20, 3)}  # half of the channels, and a rank of ceil(40 / 16)
    with pytest.raises(ValueError, match=r"expand=0.01 leaves no channel of dim=40 for the scan"):
        visionmix.create_mixer(name, 40, expand=0.01)


@pytest.mark.parametrize("name", ["bidirectional_mamba", "gated_linear_attention"])
def test_mixers_of_one_sequence_refuse_joined_orders(name):
    with pytest.raises(ValueError, match="order='msvmamba_lowres' reads cells more than once"):
        visionmix.create_mixer(name, 24, order="msvmamba_lowres")


def test_scan_options_have_mambas_names():
    for name in (n for n in visionmix.list_mixers() if n.endswith(("_scan", "_mamba"))):
        options = mixer_options(name)
        assert "d_state" in options
        assert not {"states", "step_rank"} & options.keys()
        with pytest.raises(ValueError, match=r"states=8 \(did you mean 'd_state'"):
            visionmix.create_mixer(name, 24, states=8)
    with pytest.raises(ValueError, match=r"step_rank=2 \(did you mean 'dt_rank'"):
        visionmix.create_mixer("cross_scan", 24, step_rank=2)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("qkv_bias", "no", TypeError),
        ("qkv_bias", 1, TypeError),
        ("lepe", True, TypeError),
        ("num_heads", "3", TypeError),
        ("num_heads", 3.0, TypeError),
        ("attn_drop", float("nan"), ValueError),
        ("attn_drop", None, TypeError),
    ],
)
def test_options_of_another_kind_are_named(option, value, error):
    with pytest.raises(error, match=f"mixer 'softmax': {option}="):
        visionmix.create_mixer("softmax", 96, **{"num_heads": 3, option: value})


# Values that no option of this kind has, and those that some have: 0 may be a rate, or a count of nothing.
SENSELESS = {
    bool: (1, "yes"),
    int: (-1, 2.5, "3", True),
    float: (-1.0, float("inf"), float("nan"), "1", True),
    str: (3, ["a"], "no such name"),
}
ZEROS = {
    "alpha", "attn_drop", "bias_scale", "filter_depth", "high", "momentum", "norm_eps", "proj_drop", "share", "steps",
    "threshold",
}  # fmt: skip


@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_every_option_of_a_mixer_refuses_values_that_make_no_sense(name):
    for option, parameter in mixer_options(name).items():
        for kind in get_args(parameter.annotation) or (parameter.annotation,):
            zero = (0,) if kind in (int, float) and option not in ZEROS else ()
            for value in SENSELESS.get(kind, ()) + zero:
                with pytest.raises((TypeError, ValueError), match=option):
                    visionmix.create_mixer(name, 24, **{option: value})


def test_lists_of_a_mixer_hold_values_of_their_kind():
    for sizes in (["7"], [7.5], "7", 7):
        with pytest.raises(TypeError, match="group_sizes="):
            visionmix.create_mixer("self_guided", 24, group_sizes=sizes)


@pytest.mark.parametrize("name", ["agent", "window", "local_attention_mamba"])
@pytest.mark.parametrize("value", [8, (8,), (8, 8, 8), (0, 8), "88", (8, 8.0), (True, True)])
def test_sizes_of_maps_are_two_integers(name, value):
    with pytest.raises(TypeError, match=r"grid_size=.*give \(rows, columns\)"):
        visionmix.create_mixer(name, 24, grid_size=value)


@pytest.mark.parametrize("name", ["spatial_reduction", "strip"])
@pytest.mark.parametrize("layer", ["layernorm", 3, nn.LayerNorm(24)])
def test_makers_of_layers_are_classes_or_functions(name, layer):
    with pytest.raises(TypeError, match=r"norm_layer=.*give a class or function"):
        visionmix.create_mixer(name, 24, norm_layer=layer)


@pytest.mark.parametrize("name", visionmix.list_mixers())
def test_every_mixer_refuses_a_width_that_is_none(name):
    for dim, error in (("32", TypeError), (True, TypeError), (0, ValueError)):
        with pytest.raises(error, match="dim="):
            visionmix.create_mixer(name, dim)


def test_classes_check_what_they_are_given_by_place_and_by_name():
    cls = mixer_named("window")
    for args, options, said in (
        ((24, 3, 7.0), {}, "window_size=7.0"),
        ((24, 3), {"shift": "no"}, "shift='no'"),
        ((), {"dim": 24.0}, "dim=24.0"),
        ((24,), {"dtype": "float32"}, "dtype='float32'"),
    ):
        with pytest.raises(TypeError, match=said):
            cls(*args, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        cls(24, windows=7)
    with pytest.raises(TypeError, match="'dim'"):
        cls()
    with pytest.raises(ValueError, match="window_size=0 is"):
        cls(24, 3, window_size=0)


@pytest.fixture
def registered():
    """Return a decorator that registers a mixer until the test ends."""
    names = []

    def register(cls):
        names.append(f"mine_{len(names)}")
        return mixers.register_mixer(names[-1])(cls)

    yield register
    for name in names:
        del mixers.registry._MIXERS._classes[name]


def test_classes_derived_from_a_mixer_check_what_it_checks(registered):
    window = mixer_named("window")

    class Plain(window):
        pass

    class Counted(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.count = 0

    @registered
    class Both(Counted, window):
        pass

    for cls in (Plain, Both):
        assert cls(24, 3, window_size=5).window_size == 5
        with pytest.raises(TypeError, match="shift='no'"):
            cls(24, shift="no")
    assert visionmix.create_mixer("mine_0", 24, num_heads=4).num_heads == 4


def test_mixers_of_users_take_numbers_that_ours_refuse(registered):
    @registered
    class Shift(nn.Module):
        def __init__(self, dim: int = 24, offset: int = 0, **kwargs):
            super().__init__()
            self.offset = offset

    assert (Shift().offset, Shift(24, -1).offset) == (0, -1)
    assert timm.create_model("test_vig", mixer={"name": "mine_0", "offset": -2}).blocks[0].mixer.offset == -2
    with pytest.raises(TypeError, match=r"offset=0\.5"):
        Shift(24, offset=0.5)


@pytest.mark.parametrize(
    ("name", "cls", "error"), [(3, nn.Module, TypeError), ("", nn.Module, ValueError), ("a", int, TypeError)]
)
def test_what_cannot_be_registered_leaves_the_names_as_they_were(name, cls, error):
    before = visionmix.list_mixers()
    with pytest.raises(error):
        mixers.register_mixer(name)(cls)
    assert visionmix.list_mixers() == before

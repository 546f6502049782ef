"""Methods by name, their schedules, and what is refused."""

import pytest
import timm
import torch
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from torch import nn

from visionmix import reduction
from visionmix.reduction.evit import schedule as evit_schedule
from visionmix.reduction.tome import schedule as tome_schedule

INF = float("inf")
ROTARY = {"name": "softmax", "rotary": True}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}


def test_schedules_of_merging():
    assert tome_schedule(8, 3) == (8, 8, 8)
    assert tome_schedule([3, 0, 2], 5) == (3, 0, 2, 0, 0)
    assert tome_schedule((13, -1.0), 12) == (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)
    assert tome_schedule((8, 0), 4) == (8, 8, 8, 8)
    assert tome_schedule((8, 1.0), 5) == (0, 4, 8, 12, 16)
    assert tome_schedule((8, -1.0), 1) == (16,)


def test_schedules_of_pruning():
    assert evit_schedule(0.7, None, 12) == (1, 1, 1, 0.7, 1, 1, 0.7, 1, 1, 0.7, 1, 1)
    assert evit_schedule([0.9, 0.8, 0.7], None, 8) == (1, 1, 0.9, 1, 0.8, 1, 0.7, 1)
    assert evit_schedule([0.9, 0.8], [2, 0], 3) == (0.8, 1, 0.9)
    assert evit_schedule([1, 0.5, 1, 0.5], None, 4) == (1, 0.5, 1, 0.5)


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        ("tomme", {"r": 8}, ValueError, "did you mean 'tome'"),
        ("tome", {"R": 8}, ValueError, r"no option R=8 \(did you mean"),
        ("tome", {"r": 8, "propattn": True}, ValueError, "did you mean 'prop_attn'"),
        ("tome", {}, ValueError, "needs the option r"),
        ("tome", {"r": -1}, ValueError, "r=-1"),
        ("tome", {"r": [2, -1]}, ValueError, r"r=\[2, -1\]"),
        ("tome", {"r": [1] * 5}, ValueError, "5 entries and the model 4 blocks"),
        ("tome", {"r": 2.5}, TypeError, r"r=2\.5"),
        ("tome", {"r": True}, TypeError, "r=True"),
        ("tome", {"r": (1, 2, 3)}, TypeError, r"\(1, 2, 3\)"),
        ("tome", {"r": (8, -1.5)}, ValueError, "slope"),
        ("tome", {"r": (-8, 0.5)}, ValueError, "slope"),
        ("evit", {"keep_rate": 0}, ValueError, r"keep_rate=0: .*\(0, 1\]"),
        ("evit", {"keep_rate": 1.01}, ValueError, r"keep_rate=1\.01"),
        ("evit", {"keep_rate": float("nan")}, ValueError, "keep_rate=nan"),
        ("evit", {"keep_rate": [0.5, 0.5]}, ValueError, "2 entries"),
        ("evit", {"keep_rate": "half"}, TypeError, "keep_rate='half'"),
        ("evit", {"layers": [4]}, ValueError, r"layers=\[4\]"),
        ("evit", {"layers": [1, 1]}, ValueError, r"layers=\[1, 1\]"),
        ("evit", {"layers": 2}, TypeError, "layers=2"),
        ("evit", {"layers": [1, 2], "keep_rate": [0.5]}, ValueError, "1 entries"),
        ("tome", {"r": 8, "prop_attn": "no"}, TypeError, "prop_attn='no': give True or False"),
        ("evit", {"fuse": 0}, TypeError, "fuse=0: give True or False"),
        ("mctf_fast", {"bidirectional": None}, TypeError, "bidirectional=None: give True or False"),
        ("mctf", {"r": INF}, TypeError, "r=inf: give a number of tokens, or a fraction"),
        ("mctf", {"r": float("nan")}, ValueError, "r=nan: give a number of 0 or more"),
        ("mctf", {"r_teacher": -1}, ValueError, "r_teacher=-1: give a number of 0 or more"),
        ("mctf", {"consistency_weight": INF}, ValueError, "consistency_weight=inf: .*not infinite"),
        ("avit", {"ponder_weight": 10**400}, ValueError, "ponder_weight=10000.*: give a number of 0 or more"),
        ("zero_tprune", {"layers": 2}, TypeError, "layers=2: give a list of block numbers"),
        ("avit", {"gate_scale": INF}, ValueError, "gate_scale=inf: give a number, not infinite"),
        ("avit", {"gate_center": float("nan")}, ValueError, "gate_center=nan: give a number"),
        ("avit", {"ponder_weight": -0.1}, ValueError, r"ponder_weight=-0\.1: give a number of 0 or more"),
        ("avit", {"target_depth": 0.5}, ValueError, r"target_depth=0\.5: give a number from 1 to 4"),
        ("avit", {"target_depth": "late"}, TypeError, "target_depth='late': give a number of blocks"),
        ("dynamicvit", {"ratio_weight": INF}, ValueError, "ratio_weight=inf: .*not infinite"),
        ("dynamicvit", {"distill_weight": None}, TypeError, "distill_weight=None: give a number"),
    ],
)
def test_bad_options_are_refused(method, options, error, text):
    with pytest.raises(error, match=text):
        reduction.apply(VisionTransformer(**SMALL), method, **options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock), "class ParallelScalingBlock"),
        (lambda: VisionTransformer(**SMALL, block_fn=DiffParallelScalingBlock), "class DiffParallelScalingBlock"),
        (lambda: VisionTransformer(**SMALL, attn_layer="diff"), "class DiffAttention"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "class Eva"),
        (lambda: timm.create_model("test_resnet"), "class ResNet"),
        (lambda: timm.create_model("vig_t"), "GatedLinearAttention is not softmax attention"),
        (
            lambda: timm.create_model("test_plain", mixer={"name": "softmax", "rotary": True}),
            "SoftmaxAttention reads a map",
        ),
        (lambda: nn.Linear(2, 2), "class Linear"),
        (lambda: torch.compile(VisionTransformer(**SMALL)), r"OptimizedModule .* wraps another model \(reduce that"),
        (lambda: nn.DataParallel(VisionTransformer(**SMALL)), "class DataParallel .* wraps another model"),
    ],
)
def test_models_that_cannot_be_reduced_are_refused(make, text):
    with pytest.raises(TypeError, match=text):
        reduction.apply(make(), "tome", r=2)


LIKE_VIT = {
    "samvit_base_patch16_224": "into windows and has a bias",
    "swin_tiny_patch4_window7_224": "into windows",
    "hiera_tiny_224": "pool groups of cells",
    "eva02_tiny_patch14_224": "turns queries and keys",
    "naflexvit_base_patch16_gap": "grids of their own",
}
MORE_LIKE_VIT = {
    "beit_base_patch16_224": "a bias for every pair",
    "cait_xxs24_224": "class token joins after",
    "convit_tiny": "a bias for every pair",
    "crossvit_9_240": "two sequences",
    "davit_tiny": "into windows",
    "maxvit_rmlp_pico_rw_256": "into windows",
    "mvitv2_tiny": "pools whole maps",
    "pit_ti_224": "pool whole maps",
    "pvt_v2_b0": "shrinks whole maps",
    "sam2_hiera_tiny": "into windows",
    "swinv2_cr_tiny_224": "into windows",
    "swinv2_tiny_window8_256": "into windows",
    "tnt_s_legacy_patch16_224": "pixels of its own",
    "twins_svt_small": "into windows",
    "vit_relpos_small_patch16_224": "a bias for every pair",
    "vit_small_patch16_dinov3": "turns queries and keys",
    "volo_d1_224": "outlook attention",
    "xcit_nano_12_p16_224": "one of channels",
}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *LIKE_VIT.items(),
        *(pytest.param(*each, marks=pytest.mark.long) for each in MORE_LIKE_VIT.items()),
    ],
)
def test_models_like_vit_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"class {type(model).__name__} cannot be reduced, since .*{reason}"):
        reduction.apply(model, "tome", r=2)


@pytest.mark.parametrize(
    "name",
    [
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_tiny_r_s16_p8_224",
        "flexivit_small",
        "vit_base_patch32_clip_224",
    ],
)
def test_models_that_are_a_vit_are_served(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=2)
    assert reduction.apply(model, "tome", r=2).reduction.name == "tome"


def test_a_forward_path_of_its_own_is_not_overruled():
    class Other(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x) * 2

    with pytest.raises(TypeError, match="forward_features of its own"):
        reduction.apply(Other(**SMALL), "tome", r=2)


def test_applying_twice_and_removing_nothing_are_refused():
    model = VisionTransformer(**SMALL)
    with pytest.raises(ValueError, match=r"reduction\.remove"):
        reduction.apply(reduction.apply(model, "tome", r=2), "evit")
    with pytest.raises(TypeError, match="not reduced"):
        reduction.remove(model)


def test_masks_are_refused():
    fast = reduction.apply(VisionTransformer(**SMALL), "tome", r=2)
    with pytest.raises(ValueError, match="attn_mask"):
        fast(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="output_fmt='NCWH'"):
        fast.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NCWH")
    with pytest.raises(ValueError, match="trace_source=True"):
        fast.forward_tokens(torch.randn(1, 3, 32, 32)).cells()


def test_methods_are_registered_by_name():
    assert {"tome", "evit"} <= set(reduction.list_methods())
    with pytest.raises(ValueError, match="taken by ToMe"):
        reduction.register_method("tome")(reduction.EViT)
    assert repr(reduction.apply(VisionTransformer(**SMALL), "tome", r=2).reduction).startswith("tome(r=(2, 2, 2, 2)")

"""Published detectors and segmentation models, under their authors' keys, load whole and strictly."""

import re

import golden
import pytest
import timm
import torch

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
pytest.importorskip("mmdet", reason=REASON)
pytest.importorskip("mmseg", reason=REASON)
pytest.importorskip("mmcv.ops", reason=REASON)

from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.runner import load_checkpoint  # noqa: E402

from visionmix.tools import openmmlab  # noqa: E402

# Keys of necks and heads in files of mmdet 2 and mmseg 0, which most of these models were published with.
WB = r"(weight|bias)"
BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
FPN = rf"neck\.(lateral|fpn)_convs\.[0-4]\.conv\.{WB}"
RPN = rf"rpn_head\.rpn_(conv|cls|reg)\.{WB}"
MASK = rf"roi_head\.mask_head(\.[0-2])?\.(convs\.[0-3]\.conv|upsample|conv_logits)\.{WB}"
UPER = r"decode_head\.(psp_modules\.[0-3]\.1|bottleneck|lateral_convs\.[0-2]|fpn_convs\.[0-2]|fpn_bottleneck)"
HEADS = {
    "mask_rcnn": [FPN, RPN, MASK, rf"roi_head\.bbox_head\.(shared_fcs\.[01]|fc_cls|fc_reg)\.{WB}"],
    "cascade_mask_rcnn": [
        FPN,
        RPN,
        MASK,
        rf"roi_head\.bbox_head\.[0-2]\.(shared_fcs\.0|fc_cls|fc_reg)\.{WB}",
        rf"roi_head\.bbox_head\.[0-2]\.shared_convs\.[0-3]\.(conv\.weight|bn\.{BN})",
    ],
    "retinanet": [FPN, rf"bbox_head\.((cls|reg)_convs\.[0-3]\.conv|retina_(cls|reg))\.{WB}"],
    "semantic_fpn": [FPN, rf"decode_head\.(conv_seg\.{WB}|scale_heads\.[0-3]\.\d\.(conv\.weight|bn\.{BN}))"],
    "upernet": [
        rf"{UPER}\.(conv\.weight|bn\.{BN})",
        rf"(decode|auxiliary)_head\.conv_seg\.{WB}",
        rf"auxiliary_head\.convs\.0\.(conv\.weight|bn\.{BN})",
    ],
}

# (config, the golden that lists the keys of its backbone, what their authors call the norm after map {i}, their head)
CASES = [
    ("mmdet/mask_rcnn_vmamba_tiny_1x", "vmamba_tiny", "outnorm{}", r"classifier\."),
    ("mmdet/retinanet_mavit_tiny_1x", "mavit_tiny", "extra_norms.{}", r"(head|proj|norm)\."),
    ("mmseg/upernet_nat_mini_160k", "nat_mini", "norm{}", r"(head|norm)\."),
    ("mmseg/semantic_fpn_mavit_tiny_80k", "mavit_tiny", "extra_norms.{}", r"(head|proj|norm)\."),
    ("mmdet/cascade_mask_rcnn_nat_mini_3x", "nat_mini", "norm{}", r"(head|norm)\."),
    ("mmdet/mask_rcnn_msvmamba_nano_1x", "msvmamba_nano", "outnorm{}", r"classifier\."),
    ("mmdet/mask_rcnn_efficient_vmamba_tiny_1x", "efficient_vmamba_tiny", "outnorm{}", r"classifier\."),
    ("mmdet/mask_rcnn_agent_swin_tiny_1x", "agent_swin_tiny", "norm{}", r"(head|norm)\."),
    ("mmdet/mask_rcnn_agent_pvt_tiny_1x", "agent_pvt_tiny", None, r"(head|norm|cls_token|pos_embed_cls)"),
    ("mmdet/mask_rcnn_swin_tiny_prepbn_1x", "swin_tiny_prepbn", "norm{}", r"(head|norm)\."),
    ("mmdet/mask_rcnn_raftmlp_s_1x", "raftmlp_s", None, r"(classifier|head|norm)"),
    ("mmdet/cascade_mask_rcnn_dinats_tiny_3x", "dinats_tiny", "norm{}", r"(head|norm)\."),
]
QUICK = ("mmdet/retinanet_mavit_tiny_1x",)


def built(name: str) -> torch.nn.Module:
    config = openmmlab.read(name, options={"model.backbone.pretrained": False})
    init_default_scope(config.default_scope)
    with golden.quick_start():
        return MODELS.build(config.model).eval()


def published(model: torch.nn.Module, case: str, norm: str | None, head: str) -> dict[str, torch.Tensor]:
    """Return a file as its authors would have written it: filled by key."""
    meta, _ = golden.load(case)
    backbone = {key: value for key, value in golden.state_dict(meta).items() if not re.match(head, key)}
    for index, width in enumerate(timm.create_model(case, features_only=True).feature_info.channels() if norm else ()):
        for leaf in ("weight", "bias"):
            key = f"{norm.format(index)}.{leaf}"
            backbone[key] = torch.from_numpy(golden.fill(key, (width,)))
    others = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    heads = {
        key: torch.from_numpy(golden.fill(key, tuple(value.shape))).to(value.dtype) for key, value in others.items()
    }
    return {f"backbone.{key}": value for key, value in backbone.items()} | heads


@pytest.mark.parametrize(
    ("name", "case", "norm", "head"),
    [case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.long) for case in CASES],
)
def test_a_published_file_loads_whole(tmp_path, name, case, norm, head):
    model = built(f"{name}.py")
    content = published(model, case, norm, head)
    kind = re.match(r"mm\w+/(\w+?)_(?=(vmamba|mavit|nat|ms|eff|agent|swin|raft|plain|dinat))", name)[1]
    own = [key for key in content if not key.startswith("backbone.")]
    assert [key for key in own if not any(re.fullmatch(pattern, key) for pattern in HEADS[kind])] == []
    torch.save({"state_dict": content, "meta": {}}, tmp_path / "published.pth")
    load_checkpoint(model, str(tmp_path / "published.pth"), map_location="cpu", strict=True)
    state = model.state_dict()
    assert all(torch.equal(state[key], content[key]) for key in own)

    with golden.quick_start():  # the classifier that the same tensors make
        classifier = timm.create_model(
            case, pretrained=True, pretrained_cfg_overlay={"state_dict": golden.state_dict(golden.load(case)[0])}
        )
    backbone = model.backbone.features.model.state_dict()
    theirs = classifier.state_dict()
    assert backbone
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.items())
    for index, stage in enumerate(model.backbone.features.feature_info.out_indices if norm else ()):
        given = content[f"backbone.{norm.format(stage)}.weight"]
        assert torch.equal(model.backbone.norms[index].weight, given)


def test_a_file_that_lacks_a_tensor_or_is_another_models_is_refused():
    model = built("mmseg/upernet_nat_mini_160k.py")
    content = published(model, "nat_mini", "norm{}", r"(head|norm)\.")
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    short = {key: value for key, value in content.items() if key != "backbone.levels.1.blocks.0.attn.rpb"}
    with pytest.raises(ValueError, match="these weights are not nat_mini's"):
        model.load_state_dict(short, strict=False)
    more = content | {"backbone.levels.9.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown: .*9\.weight"):
        model.load_state_dict(more, strict=False)
    after = model.backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(RuntimeError, match=r"norms\.2\.weight"):  # a norm that the file should have
        model.load_state_dict({key: value for key, value in content.items() if not key.startswith("backbone.norm2.")})


def test_what_was_saved_here_loads_as_ever():
    model = built("mmseg/upernet_nat_mini_160k.py")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = built("mmseg/upernet_nat_mini_160k.py")
    other.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())

"""Mixers against what single modules of published code compute: code without a classifier, and modules of a classifier
whose logits hardly see them."""

import re

import golden
import pytest
import timm
import torch

import visionmix
from visionmix.models.keys import regrouped

_HEADS = "CXSZ"  # the published heads, in their order
_NAMES = [
    (r"(^|mhs\.)x_ssproj_W$", "x_proj.weight"),
    (r"(^|mhs\.)scanhead_(.)\.mambaeng\.", lambda match: f"heads.{_HEADS.index(match[2])}."),
    (r"(^|mhs\.)cat_norm\.", "head_norm."),
    (r"(^|mhs\.)y_proj\.", "y_proj."),
    (r"^conv2d\.", "conv."),
    (r"^out_norm\.", "norm."),
    (r"\.x_proj_weight$", ".x_proj.weight"),
    (r"\.dt_projs_(weight|bias)$", r".delta_\1"),
    (r"\.A_logs$", ".A_log"),
    (r"\.Ds$", ".D"),
]


@pytest.mark.parametrize(("case", "num_heads"), [("mhs_module", 3), ("mhs_module_4head", 4), ("mhs_vssgate", 3)])
def test_multi_head_scan(case, num_heads):
    meta, arrays = golden.load(case)
    mixer = visionmix.create_mixer("multi_head_scan", 96, num_heads=num_heads).eval()
    tensors, own = {}, mixer.state_dict()
    for key, shape in meta["filled"]:
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        filled = torch.from_numpy(golden.fill(key, tuple(shape)))
        tensors[name] = regrouped(filled, own[name].shape) if name in own else filled
    missing, unexpected = mixer.load_state_dict(tensors, strict=False)
    assert not unexpected
    image = golden.image(32, 32, channels=96).permute(0, 2, 3, 1)
    with torch.no_grad():
        if case == "mhs_vssgate":
            assert not missing
            out = mixer(image)
        else:  # the module without the block's projections around it
            assert {key.partition(".")[0] for key in missing} == {"in_proj", "conv", "norm"}
            out = mixer.scan(image)
    assert golden.relative_error(out, arrays["logits"]) <= 1e-5


# How many entries of the published list of stages a stage takes; downsamplers stand in it too.
_ENTRIES = {"spatial_mamba_tiny": 1, "a2mamba_nano": 2, "segman_tiny": 2}


@pytest.mark.parametrize("case", _ENTRIES)
def test_mixers_inside_a_model(case):
    meta, arrays = golden.load(f"{case}_mixers")
    overlay = {"state_dict": {"model": golden.state_dict(meta)}}
    with golden.quick_start():
        model = timm.create_model(meta["name"], pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert len(arrays) == len(meta["calls"])
    for call, each in enumerate(meta["calls"]):
        _, entry, _, block, _ = each["module"].split(".")
        mixer = model.stages[int(entry) // _ENTRIES[case]].blocks[int(block)].mixer
        x = golden.image(*each["size"], channels=each["channels"]).permute(0, 2, 3, 1)
        with torch.no_grad():
            assert golden.relative_error(mixer(x).permute(0, 3, 1, 2), arrays[f"out{call}"]) <= 1e-5
            with visionmix.kernels.use("reference"):
                out = mixer.double()(x.double()).permute(0, 3, 1, 2)
            assert golden.relative_error(out, arrays[f"out{call}"]) <= 1e-9
            mixer.float()

"""The backbone inside mmdet, mmseg and mmpretrain; the configs; the commands."""

import json
import re
from inspect import signature

import doc_pages
import pytest
import torch

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
pytest.importorskip("mmdet", reason=REASON)
pytest.importorskip("mmseg", reason=REASON)
pytest.importorskip("mmcv.ops", reason=REASON)

from mmdet.registry import MODELS  # noqa: E402

from visionmix.backbones.parallel import Parallel  # noqa: E402
from visionmix.models import list_family_models  # noqa: E402
from visionmix.models.family import family_of, variant_of  # noqa: E402
from visionmix.tools import check_configs, demo_data, draw_predictions, openmmlab, train_det, train_seg  # noqa: E402
from visionmix.tools.wheel_data import MANIFEST  # noqa: E402

QUICK = ("demo/trees.py", "demo/nuclei.py")


@pytest.mark.parametrize("name", QUICK)
def test_small_configs_train_and_predict(name):
    assert "loss" in check_configs.check(name)


TINY = {"name": "test_vmamba", "pretrained": False}
MAPS = [16, 32, 64, 128]  # its channels
KINDS = [
    ("mmdet/mask_rcnn_vmamba_tiny_1x.py", {"neck.in_channels": MAPS}),
    ("mmdet/cascade_mask_rcnn_nat_mini_3x.py", {"neck.in_channels": MAPS}),
    ("mmdet/retinanet_vmamba_tiny_1x.py", {"neck.in_channels": MAPS[1:]}),
    ("mmseg/upernet_vmamba_tiny_160k.py", {"decode_head.in_channels": MAPS, "auxiliary_head.in_channels": MAPS[2]}),
    ("mmseg/semantic_fpn_mavit_tiny_80k.py", {"neck.in_channels": MAPS}),
    (
        "mmdet/retinanet_plainmamba_l1_1x.py",
        {"neck.in_channels": [48] * 3, "backbone.name": "test_vig", "backbone.depth": 4, "backbone.width": 8},
    ),
    (
        "mmdet/cascade_mask_rcnn_vim_tiny_100e.py",
        {
            "neck.in_channels": 32,
            "backbone.name": "test_vim_tiny",
            "backbone.out_indices": [1],
            "backbone.img_size": 96,
        },
    ),
]


def test_the_config_of_the_page_is_read_and_built(tmp_path):
    (page,) = (page for page in doc_pages.pages() if page.name == "openmmlab.md")
    code = next(block.code for block in doc_pages.blocks(page.read_text()) if block.code.startswith("_base_"))
    (tmp_path / "mine.py").write_text(code)
    config = openmmlab.read(str(tmp_path / "mine.py"), options={"model.backbone.pretrained": False})
    assert openmmlab.read(str(tmp_path / "mine.py")).model.backbone.pretrained
    with torch.device("meta"):
        detector = MODELS.build(config.model)
    assert detector.backbone.channels == config.model.neck.in_channels == [96, 192, 384, 768]


def narrow(node) -> None:
    """Give the necks and heads of a config 16 channels wherever they have 128 or more."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            narrow(value)
        if str(key).endswith("channels"):
            wide = value if isinstance(value, list) else [value]
            if all(width >= 128 for width in wide):
                node[key] = [16] * len(wide) if isinstance(value, list) else 16


@pytest.mark.parametrize(("name", "channels"), KINDS)
def test_a_config_of_each_kind_trains_and_predicts(monkeypatch, name, channels):
    """With a tiny model, few boxes and narrow heads."""
    read = openmmlab.read

    def tiny_model(name, **options):
        config = read(name, **options)
        narrow(config.model)
        config.model.backbone.update(TINY)
        config.merge_from_dict({f"model.{key}": value for key, value in channels.items()})
        return config

    monkeypatch.setattr(openmmlab, "read", tiny_model)
    monkeypatch.setattr(check_configs, "BOXES", 4)
    assert "loss" in check_configs.check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in check_configs.configs([]) if name not in QUICK])
def test_configs_build_train_and_predict(name):
    assert "loss" in check_configs.check(name)


def test_check_configs_reports_a_failure(monkeypatch, capsys):
    read = openmmlab.read

    def broken(name, **options):
        config = read(name, **options)
        config.model.backbone.name = "no_such_model"
        return config

    monkeypatch.setattr(openmmlab, "read", broken)
    assert check_configs.main(["nuclei"]) == 1
    assert "FAILED: ValueError: name='no_such_model'" in capsys.readouterr().out


def test_check_configs_sees_parameters_without_a_gradient(monkeypatch):
    read = openmmlab.read

    def first_map_unused(name, **options):
        config = read(name, **options)
        config.model.backbone.out_indices = (0, 1, 2, 3)
        config.model.neck.update(in_channels=[24, 48, 96, 192], start_level=1)
        return config

    monkeypatch.setattr(openmmlab, "read", first_map_unused)
    with pytest.raises(ValueError, match=r"2 parameters had no gradient, backbone\.norms\.0\.bias"):
        check_configs.check("demo/trees.py")


# Families by what their papers train, each by the first model of it here.
PAPERS = {
    "mmdet/mask_rcnn_{}_1x.py": "agent_pvt_tiny agent_swin_tiny efficient_vmamba_tiny flatten_pvt_tiny mavit_tiny "
    "msvmamba_nano raftmlp_s ravlt_tiny sgformer_small slab_swin_tiny vig_h_t vmamba_tiny local_vmamba_tiny "
    "spatial_mamba_tiny vim2_tiny vssd_tiny plainmamba_l1 mila_tiny pvt_tiny_prepbn transnext_tiny l2vit_tiny "
    "a2mamba_tiny care_s0 favit_b0 fmvit_small inline_pvt_tiny nalaformer_t polaformer_pvt_tiny polaformer_swin_tiny "
    "s2aformer_xs softpp_tiny van_b0 vmamba_tiny_v0",
    "mmdet/mask_rcnn_{}_3x.py": "agent_swin_tiny dinat_mini dinats_tiny efficient_vmamba_base flatten_swin_tiny "
    "mavit_small msvmamba_tiny nat_mini ravlt_small sgformer_small swin_tiny_prepbn vmamba_tiny local_vmamba_tiny "
    "spatial_mamba_tiny vssd_tiny mila_tiny l2vit_tiny polaformer_swin_tiny vmamba_tiny_v0",
    "mmdet/cascade_mask_rcnn_{}_3x.py": "agent_swin_tiny dinat_mini dinats_tiny flatten_swin_tiny mavit_small nat_mini "
    "ravlt_small mambavision_tiny a2mamba_tiny convnext_dcls_tiny stvit_r_swin_small van_b2",
    "mmdet/mask_rcnn_{}_100e.py": "local_vim_tiny",
    "mmdet/cascade_mask_rcnn_{}_100e.py": "vim_tiny",
    "mmdet/retinanet_{}_1x.py": "agent_pvt_tiny flatten_pvt_tiny mavit_tiny raftmlp_s ravlt_tiny plainmamba_l1 "
    "l2vit_tiny dualtoken_vit_tiny efficient_vmamba_tiny favit_b0 nalaformer_t polaformer_pvt_tiny s2aformer_xs "
    "softpp_tiny van_b0",
    "mmdet/retinanet_{}_3x.py": "l2vit_tiny",
    "mmseg/upernet_{}_160k.py": "agent_swin_tiny dinat_mini dinats_tiny flatten_swin_tiny mavit_tiny msvmamba_nano "
    "nat_mini plainmamba_l1 ravlt_small sgformer_small vig_h_t vmamba_tiny local_vmamba_tiny spatial_mamba_tiny "
    "vil_tiny vim2_tiny vssd_tiny mambavision_tiny local_vim_tiny hrvmamba_base mila_base van_b0 transnext_tiny "
    "l2vit_tiny a2mamba_tiny convnext_dcls_tiny efficient_vmamba_tiny inline_swin_tiny nalaformer_t "
    "polaformer_swin_tiny softpp_small stvit_r_swin_small vmamba_tiny_v0",
    "mmseg/upernet_{}_60k.py": "vim_tiny mambar_small",
    "mmseg/semantic_fpn_{}_40k.py": "agent_pvt_tiny raftmlp_s van_b0 care_s0 inline_pvt_tiny",
    "mmseg/semantic_fpn_{}_80k.py": "flatten_pvt_tiny mavit_tiny ravlt_small fmvit_small polaformer_pvt_tiny "
    "s2aformer_xs",
    "mmseg/semantic_fpn_{}_160k.py": "favit_b0",
}


def test_every_family_has_the_configs_of_its_paper():
    names = check_configs.configs(["mm"])
    listed = [(config, model) for config, models in PAPERS.items() for model in models.split()]
    assert [config.format(model) for config, model in listed if config.format(model) not in names] == []
    families = {(config, family_of(model).module) for config, model in listed}
    for name in names:  # no family that this list forgets, but those whose papers train something else
        text = (check_configs.ROOT / name).read_text()
        (model,) = re.findall(r'name="(\w+)"', text)
        own = "Its paper trains" in text or (name.replace(f"_{model}_", "_{}_"), family_of(model).module) in families
        assert own, f"{name} is of no paper in PAPERS"


def test_a_config_names_its_model_and_its_source():
    """Without OpenMMLab's own merging, which takes a tenth of a second each."""
    for name in check_configs.configs(["mm"]):
        text = (check_configs.ROOT / name).read_text()
        (model,) = re.findall(r'name="(\w+)"', text)
        assert f"_{model}_" in name
        assert model in list_family_models(), name
        assert "arXiv" in text.split("_base_ =")[0], name
        options = variant_of(model).layout.options
        channels = list(options.get("embed_dims", ()))
        if "neck_features=True" in text:
            widths = options.get("neck_dims", signature(Parallel).parameters["neck_dims"].default)
            channels = [*widths[:-2], widths[-1]]
        if channels and "retinanet" not in name:
            assert f"in_channels={channels}" in text, name


def test_layer_decay_reaches_the_optimiser():
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    config = openmmlab.read("mmseg/upernet_vim_tiny_60k.py", options={"model.backbone.pretrained": False})
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    rates = {round(group["lr"], 12) for group in groups}
    assert max(rates) == 1e-4
    assert min(rates) == pytest.approx(1e-4 * 0.92**25)  # 24 blocks and the stem, below the heads


def test_stem_and_positions_of_local_vim_learn_slowly():
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    config = openmmlab.read("mmdet/mask_rcnn_local_vim_tiny_100e.py", options={"model.backbone.pretrained": False})
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    slow, decays = set(), set()
    for group in build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups:
        for parameter in group["params"]:
            if group["lr"] < 1e-4:
                assert group["lr"] == pytest.approx(1e-4 * 0.7**13)
                slow.add(names[parameter])
            decays.add((group["weight_decay"], "pos_embed" in names[parameter]))
    prefix = "backbone.features.model"
    assert slow == {f"{prefix}.stem.conv1.weight", f"{prefix}.stem.conv1.bias", f"{prefix}.pos_embed.weight"}
    assert decays == {(0.05, False), (0.0, True)}


def test_mmpretrain_trains_a_classifier():
    mmpretrain = pytest.importorskip("mmpretrain.models", reason=REASON)
    from mmengine.registry import DefaultScope
    from mmpretrain.structures import DataSample

    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = mmpretrain.build_classifier(
            {
                "type": "ImageClassifier",
                "backbone": {"type": "visionmix.Backbone", "name": "test_vmamba", "out_indices": (3,)},
                "neck": {"type": "GlobalAveragePooling"},
                "head": {"type": "LinearClsHead", "num_classes": 5, "in_channels": 128},
            }
        )
    samples = [DataSample().set_gt_label(label) for label in (1, 4)]
    loss = model(torch.randn(2, 3, 48, 64), samples, mode="loss")["loss"]
    loss.backward()
    assert model.backbone.features.model.stem.conv1.weight.grad is not None
    assert model.eval()(torch.randn(2, 3, 48, 64), samples, mode="predict")[0].pred_score.shape == (5,)


def test_a_plain_model_serves_a_head_of_one_stride():
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmseg")
    config = openmmlab.read("demo/nuclei.py").model
    config.backbone = {"type": "visionmix.Backbone", "name": "test_vig", "one_stride": True}
    config.decode_head.update(in_channels=[48, 48, 48], in_index=(0, 1, 2))
    model = MODELS.build(config).eval()
    assert model(torch.randn(1, 3, 64, 96), mode="tensor").shape == (1, 2, 4, 6)


def test_a_plain_model_serves_a_detector_through_a_pyramid(monkeypatch):
    read = openmmlab.read

    def plain(name, **options):
        config = read(name, **options)
        backbone = {"type": "visionmix.Backbone", "name": "test_vig", "depth": 4, "one_stride": True}
        config.model.backbone = {**backbone, "out_indices": (0, 1, 2, 3)}
        pyramid = {"type": "mmseg.Feature2Pyramid", "embed_dim": 48, "norm_cfg": {"type": "BN"}}
        config.model.neck = [pyramid, {**config.model.neck, "in_channels": [48] * 4, "num_outs": 4}]
        config.model.bbox_head.anchor_generator.strides = [4, 8, 16, 32]
        return config

    monkeypatch.setattr(openmmlab, "read", plain)
    assert "boxes" in check_configs.check("demo/trees.py")


def test_data_moves_every_path_below_data_root(tmp_path):
    config = openmmlab.read("mmdet/mask_rcnn_vmamba_tiny_1x.py", str(tmp_path))
    assert config.train_dataloader.dataset.data_root == str(tmp_path)
    assert config.val_evaluator.ann_file == f"{tmp_path}/annotations/instances_val2017.json"
    assert "data/coco" not in json.dumps(config.to_dict(), default=str)


def test_one_process_has_no_synchronised_norms(monkeypatch):
    assert openmmlab.read("mmseg/upernet_vmamba_tiny_160k.py").model.decode_head.norm_cfg.type == "BN"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert openmmlab.read("mmseg/upernet_vmamba_tiny_160k.py").model.decode_head.norm_cfg.type == "SyncBN"


def test_commands_refuse_missing_and_foreign_configs(capsys):
    assert train_det.main(["mmdet/no_such.py"]) == 2
    assert "there is no recipe 'mmdet/no_such.py'" in capsys.readouterr().err
    assert train_det.main(["demo/nuclei.py"]) == 2
    assert "is a config of mmseg" in capsys.readouterr().err


SHORT = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]


def tiny(folder, kind: str):
    """A data set as `demo_data.py` makes it, of six made-up tiles: no wheel is fetched."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tree"}]}
        for number in range(3):
            image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            if kind == "detection":
                (folder / "images").mkdir(parents=True, exist_ok=True)
                image.save(folder / "images" / f"{split}{number}.png")
                content["images"].append({"id": number, "file_name": f"{split}{number}.png", "width": 64, "height": 64})
                box = {"bbox": [8, 8, 24, 20], "area": 480, "iscrowd": 0, "category_id": 1}
                content["annotations"].append({"id": number + 1, "image_id": number, **box})
            else:
                for sort in ("images", "masks"):
                    (folder / sort / split).mkdir(parents=True, exist_ok=True)
                image.save(folder / "images" / split / f"{number}.png")
                mask = Image.fromarray(rng.integers(0, 2, (64, 64), dtype=np.uint8))
                mask.save(folder / "masks" / split / f"{number}.png")
        if kind == "detection":
            (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "run"),
    [
        pytest.param("detection", "trees", train_det, marks=pytest.mark.long),
        ("segmentation", "nuclei", train_seg),
    ],
)
def test_training_saves_resumes_and_is_drawn(tmp_path, kind, config, run):
    data = str(tiny(tmp_path / "data", kind))
    work = tmp_path / "work"
    command = [f"demo/{config}.py", "--data", data, "--work-dir", str(work), "--cfg-options", *SHORT]
    assert run.main(command) == 0
    assert (work / "iter_2.pth").is_file()
    assert run.main([*command, "train_cfg.max_iters=3", "--resume"]) == 0
    assert (work / "last_checkpoint").read_text().endswith("iter_3.pth")
    picture = tmp_path / "found.png"
    assert draw_predictions.main([str(work / f"{config}.py"), str(work / "iter_2.pth"), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "config", "run", "metric", "least"),
    [
        ("detection", "trees", train_det, "coco/bbox_mAP_50", 0.20),
        ("segmentation", "nuclei", train_seg, "mIoU", 75.0),
    ],
)
def test_training_on_real_tiles_reaches(tmp_path, kind, config, run, metric, least):
    data = tmp_path / "data"
    assert demo_data.main([kind, "--out", str(data)]) == 0
    assert (data / MANIFEST).is_file()
    assert run.main([f"demo/{config}.py", "--data", str(data), "--work-dir", str(tmp_path / "work")]) == 0
    (record,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row[metric] for row in rows if metric in row][-1] >= least

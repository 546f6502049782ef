# RetinaNet on COCO, 12 epochs of 16 images (8 GPUs x 2), by PVT's settings (arXiv 2102.12122), which papers on such
# models take over.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["visionmix.integrations.openmmlab"])
# The pyramid begins at stride 8, so the first stage's map is not asked for: its norm would never have a gradient.
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionmix.Backbone",
        pretrained=True,
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        norm_output=True,
    ),
    neck=dict(start_level=0),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))

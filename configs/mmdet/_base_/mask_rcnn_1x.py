# Mask R-CNN on COCO, 12 epochs of 16 images (8 GPUs x 2), by Swin's settings (arXiv 2103.14030), which the papers of
# these models take over.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["visionmix.integrations.openmmlab"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionmix.Backbone",
        pretrained=True,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        norm_output=True,
    )
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "pos_embed": dict(decay_mult=0.0),
            "position_bias": dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

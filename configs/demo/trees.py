# RetinaNet on tiles of aerial photographs (tools/demo_data.py detection), from scratch: minutes on two CPU cores.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["visionmix.integrations.openmmlab"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="visionmix.Backbone",
        name="vmamba_tiny",
        embed_dims=(24, 48, 96, 192),
        depths=(1, 1, 2, 1),
        out_indices=(1, 2, 3),
        norm_output=True,
    ),
    neck=dict(in_channels=[48, 96, 192], out_channels=64, num_outs=3, start_level=0),
    # One shape of anchor and three small levels: crowns are about as wide as high, and 18 to 65 pixels across.
    bbox_head=dict(
        num_classes=1,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=3, ratios=[1.0], strides=[8, 16, 32]),
    ),
)

data_root = "data/trees/"
metainfo = dict(classes=("tree",), palette=[(220, 20, 60)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),  # the head asks for the scale factor
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs"),
]
dataset = dict(type="CocoDataset", data_root=data_root, data_prefix=dict(img="images/"), metainfo=metainfo)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(ann_file="train.json", pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(ann_file="val.json", test_mode=True, pipeline=test_pipeline, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file="data/trees/val.json", metric="bbox")
test_evaluator = val_evaluator

steps = 500
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
randomness = dict(seed=0)
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=steps), logger=dict(interval=20))

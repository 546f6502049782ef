# UPerNet on tiles of a micrograph (tools/demo_data.py segmentation), from scratch: a minute on two CPU cores.
default_scope = "mmseg"
custom_imports = dict(imports=["visionmix.integrations.openmmlab"])

norm_cfg = dict(type="GN", num_groups=8)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        size_divisor=32,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        seg_pad_val=255,
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(
        type="visionmix.Backbone",
        name="vig_h_t",
        embed_dims=(24, 48, 96, 192),
        depths=(1, 1, 2, 1),
        out_indices=(0, 1, 2, 3),
        norm_output=True,
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[24, 48, 96, 192],
        in_index=(0, 1, 2, 3),
        pool_scales=(1, 2),
        channels=32,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

data_root = "data/nuclei"
metainfo = dict(classes=("background", "nucleus"), palette=[(0, 0, 0), (220, 20, 60)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
dataset = dict(
    type="BaseSegDataset", data_root=data_root, metainfo=metainfo, img_suffix=".png", reduce_zero_label=False
)
train_dataloader = dict(
    batch_size=6,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"), pipeline=train_pipeline, **dataset
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        test_mode=True,
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

steps = 300
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=30, end=steps),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
randomness = dict(seed=0)
log_processor = dict(by_epoch=False)
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=steps),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
)

# MambaVision (arXiv 2407.08083), github.com/NVlabs/MambaVision,
# semantic_segmentation/configs/mamba_vision/mamba_vision_160k_ade20k-640x640_l3_21k.py: from the weights of 512 pixels,
# with crops of 640, in float32, since half precision is unstable. Its own drop_path_rate does not reach the model,
# whose default is in force.
_base_ = "_base_/upernet_160k.py"
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        name="mambavision_large3",
        pretrained_cfg="in21k_in1k_512",
        drop_path_rate=0.2,
        window_sizes=(64, 32),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(2560, 640), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(640, 640), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2560, 640), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=8e-5, weight_decay=0.05))

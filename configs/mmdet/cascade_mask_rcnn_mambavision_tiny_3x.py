# MambaVision (arXiv 2407.08083), github.com/NVlabs/MambaVision,
# object_detection/configs/mamba_vision/cascade_mask_rcnn_mamba_vision_tiny_3x_coco.py. Its own drop_path_rate does not
# reach the model, whose default is in force; the windows are as wide as most images.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(
    backbone=dict(name="mambavision_tiny", drop_path_rate=0.2, window_sizes=(112, 56)),
    neck=dict(in_channels=[80, 160, 320, 640]),
)

# VMamba (arXiv 2401.10166).
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="vmamba_tiny"), neck=dict(in_channels=[96, 192, 384, 768]))

# MSVMamba (arXiv 2405.14174).
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="msvmamba_tiny"), neck=dict(in_channels=[96, 192, 384, 768]))

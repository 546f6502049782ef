# SLAB (arXiv 2405.11582), github.com/xinghaochen/SLAB,
# detection/configs/swin/mask_rcnn_swin_tiny_prepbn_patch4_window7_mstrain_480-800_adamw_3x_coco.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="swin_tiny_prepbn", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

# SLAB (arXiv 2405.11582), github.com/xinghaochen/SLAB,
# detection/configs/swin/mask_rcnn_slab_swin_small_patch4_window7_mstrain_480-800_adamw_1x_coco.py.
_base_ = "_base_/mask_rcnn_multiscale_1x.py"
model = dict(backbone=dict(name="slab_swin_small", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

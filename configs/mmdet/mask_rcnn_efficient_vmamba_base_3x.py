# EfficientVMamba (arXiv 2403.09977), github.com/TerryPei/EfficientVMamba,
# detection/configs/efficient/mask_rcnn_vssm_fpn_coco_efficient_2292_96.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(
    backbone=dict(name="efficient_vmamba_base", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768])
)

# EfficientVMamba (arXiv 2403.09977), github.com/TerryPei/EfficientVMamba,
# detection/configs/efficient/mask_rcnn_vssm_fpn_coco_efficient_2242_48.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="efficient_vmamba_tiny", drop_path_rate=0.1), neck=dict(in_channels=[48, 96, 192, 384]))

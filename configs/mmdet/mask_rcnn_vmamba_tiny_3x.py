# VMamba (arXiv 2401.10166), github.com/MzeroMiko/VMamba,
# detection/configs/vssm1/mask_rcnn_vssm_fpn_coco_tiny1_ms_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="vmamba_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

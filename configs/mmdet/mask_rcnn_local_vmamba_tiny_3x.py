# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# detection/configs/local_mamba/mask_rcnn_local_vssm_tiny_fpn_coco_ms_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="local_vmamba_tiny"), neck=dict(in_channels=[96, 192, 384, 768]))

# VMamba (arXiv 2401.10166), github.com/MzeroMiko/VMamba, detection/configs/vssm/mask_rcnn_vssm_fpn_coco_base.py: the
# first version, with its default drop path.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="vmamba_base_v0", drop_path_rate=0.1), neck=dict(in_channels=[128, 256, 512, 1024]))

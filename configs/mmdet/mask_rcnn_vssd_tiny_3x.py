# VSSD (arXiv 2407.18559), github.com/YuHengsss/VSSD, detection/configs/vssd/mask_rcnn_vssd_fpn_coco_tiny_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="vssd_tiny", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))

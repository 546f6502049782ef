# Spatial-Mamba (arXiv 2410.15091), github.com/EdwardChasel/Spatial-Mamba,
# detection/configs/spatialmamba/mask_rcnn_spatialmamba_fpn_coco_base.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="spatial_mamba_base", drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 384, 768]))

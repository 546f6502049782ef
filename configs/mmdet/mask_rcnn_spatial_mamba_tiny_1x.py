# Spatial-Mamba (arXiv 2410.15091), github.com/EdwardChasel/Spatial-Mamba,
# detection/configs/spatialmamba/mask_rcnn_spatialmamba_fpn_coco_tiny.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="spatial_mamba_tiny", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))

# DiNAT (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/dinat/mask_rcnn_dinat_tiny_3x_coco.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="dinat_tiny", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))

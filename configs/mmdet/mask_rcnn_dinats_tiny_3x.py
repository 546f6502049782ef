# DiNAT-s (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/dinat_s/mask_rcnn_dinat_s_tiny_3x_coco.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="dinats_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

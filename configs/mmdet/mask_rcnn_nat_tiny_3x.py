# NAT (arXiv 2204.07143), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/nat/mask_rcnn_nat_tiny_3x_coco.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="nat_tiny", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))

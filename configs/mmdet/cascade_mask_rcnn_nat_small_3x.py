# NAT (arXiv 2204.07143), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/nat/cascade_mask_rcnn_nat_small_3x_coco.py.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="nat_small", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))

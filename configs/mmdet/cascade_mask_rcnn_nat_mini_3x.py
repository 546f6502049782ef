# NAT (arXiv 2204.07143), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/nat/cascade_mask_rcnn_nat_mini_3x_coco.py.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="nat_mini", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 256, 512]))

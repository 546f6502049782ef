# NAT (arXiv 2204.07143). Its paper trains no RetinaNet; the rate of stochastic depth is that of its Mask R-CNN.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="nat_mini"), neck=dict(in_channels=[128, 256, 512]))

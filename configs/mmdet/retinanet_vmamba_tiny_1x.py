# VMamba (arXiv 2401.10166). Its paper trains no RetinaNet; the rate of stochastic depth is that of its Mask R-CNN.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="vmamba_tiny"), neck=dict(in_channels=[192, 384, 768]))

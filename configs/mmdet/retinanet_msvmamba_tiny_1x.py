# MSVMamba (arXiv 2405.14174). Its paper trains no RetinaNet; the rate of stochastic depth is that of its Mask R-CNN.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="msvmamba_tiny", drop_path_rate=0.1), neck=dict(in_channels=[192, 384, 768]))

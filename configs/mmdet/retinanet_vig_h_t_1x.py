# ViG (arXiv 2405.18425). Its paper trains no RetinaNet; the rate of stochastic depth is Swin's.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="vig_h_t"), neck=dict(in_channels=[192, 384, 768]))

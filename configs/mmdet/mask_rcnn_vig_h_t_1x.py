# ViG (arXiv 2405.18425). Its configurations are not published; the rate of stochastic depth is Swin's.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="vig_h_t"), neck=dict(in_channels=[96, 192, 384, 768]))

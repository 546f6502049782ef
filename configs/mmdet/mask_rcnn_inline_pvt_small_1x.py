# InLine (arXiv 2412.06590) publishes no configuration: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="inline_pvt_small", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))

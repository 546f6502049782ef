# FLatten (arXiv 2308.00442). Its settings are not published: PVT's, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="flatten_pvt_tiny", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))

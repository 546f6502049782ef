# FLatten (arXiv 2308.00442). Its settings are not published: Swin's.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="flatten_swin_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

# SG-Former (arXiv 2308.12216). Its settings are not published: Swin's, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="sgformer_base", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 768]))

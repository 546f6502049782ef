# SG-Former (arXiv 2308.12216). Its settings are not published: Swin's, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="sgformer_small", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

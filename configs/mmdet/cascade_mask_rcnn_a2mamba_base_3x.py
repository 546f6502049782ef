# A2Mamba (arXiv 2507.16624) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="a2mamba_base", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 512]))

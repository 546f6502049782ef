# A2Mamba (arXiv 2507.16624) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="a2mamba_tiny", drop_path_rate=0.1), neck=dict(in_channels=[48, 96, 256, 448]))

# A2Mamba (arXiv 2507.16624) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="a2mamba_small", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 320, 512]))

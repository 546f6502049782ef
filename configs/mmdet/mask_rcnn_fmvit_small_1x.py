# FMViT (arXiv 2311.05707) publishes no configuration: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="fmvit_small", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

# S2AFormer (arXiv 2505.22195) publishes no configuration: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="s2aformer_s", drop_path_rate=0.1), neck=dict(in_channels=[48, 96, 192, 384]))

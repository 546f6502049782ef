# VAN (arXiv 2202.09741) publishes no configuration of its detectors: PVT's settings, and the drop path of its UperNet.
# Stages end in norms of the model's own.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="van_b0", drop_path_rate=0.1), neck=dict(in_channels=[32, 64, 160, 256]))

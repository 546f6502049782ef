# VAN (arXiv 2202.09741) publishes no configuration of its detectors: Swin's settings, and the drop path of its UperNet.
# Stages end in norms of the model's own.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(
    backbone=dict(name="van_b2", drop_path_rate=0.1, norm_output=False), neck=dict(in_channels=[64, 128, 320, 512])
)

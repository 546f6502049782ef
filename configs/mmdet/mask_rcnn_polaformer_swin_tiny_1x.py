# PolaFormer (arXiv 2501.15061) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="polaformer_swin_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

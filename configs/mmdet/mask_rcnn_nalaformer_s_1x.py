# NaLaFormer (arXiv 2506.21137) publishes no configuration yet: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="nalaformer_s", drop_path_rate=0.15), neck=dict(in_channels=[64, 128, 320, 512]))

# NaLaFormer (arXiv 2506.21137) publishes no configuration yet: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="nalaformer_b", drop_path_rate=0.4), neck=dict(in_channels=[192, 384, 512]))

# S2AFormer (arXiv 2505.22195) publishes no configuration: PVT's settings, and the drop path of its classifier.
_base_ = "_base_/semantic_fpn_pvt_80k.py"
model = dict(backbone=dict(name="s2aformer_m", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

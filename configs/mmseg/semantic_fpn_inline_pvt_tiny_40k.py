# InLine (arXiv 2412.06590) publishes no configuration: those settings that Agent Attention, by the same authors, has
# with PVT, and the drop path of its classifier.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="inline_pvt_tiny", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))

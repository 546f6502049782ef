# Agent Attention (arXiv 2312.08874).
# Its published configuration also resizes images at random, as 36-epoch schedules do; this one does not.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="agent_swin_tiny", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768]))

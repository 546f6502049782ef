# Agent Attention (arXiv 2312.08874).
# Its paper trains RetinaNet with PVT hosts only; the rate of stochastic depth is theirs too.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="agent_swin_tiny", drop_path_rate=0.1), neck=dict(in_channels=[192, 384, 768]))

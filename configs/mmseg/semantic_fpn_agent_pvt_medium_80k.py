# Agent Attention (arXiv 2312.08874). Its settings are not published: PVT's, and the drop path of its RetinaNet.
_base_ = "_base_/semantic_fpn_pvt_80k.py"
model = dict(backbone=dict(name="agent_pvt_medium", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 320, 512]))

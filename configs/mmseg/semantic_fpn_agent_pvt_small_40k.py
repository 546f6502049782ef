# Agent Attention (arXiv 2312.08874), github.com/LeapLabTHU/Agent-Attention,
# downstream/segmentation/configs/agent_pvt/fpn_agent_pvt_s_12-16-28-28.py.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="agent_pvt_small", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))

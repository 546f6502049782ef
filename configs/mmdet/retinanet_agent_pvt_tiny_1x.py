# Agent Attention (arXiv 2312.08874), github.com/LeapLabTHU/Agent-Attention,
# downstream/detection/configs/agent_pvt/agent_pvt_t_rtn_1x_12-16-28-28.py.
_base_ = "_base_/retinanet_pvt_1x.py"
model = dict(backbone=dict(name="agent_pvt_tiny", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))

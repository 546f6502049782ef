# Agent Attention (arXiv 2312.08874), github.com/LeapLabTHU/Agent-Attention,
# downstream/detection/configs/agent_swin/agent_swin_s_mrcnn_3x_9-12-14-7.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="agent_swin_small", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768]))

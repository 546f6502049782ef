# Agent Attention (arXiv 2312.08874), github.com/LeapLabTHU/Agent-Attention,
# downstream/detection/configs/agent_swin/agent_swin_b_crcnn_3x_9-12-14-7.py.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="agent_swin_base", drop_path_rate=0.4), neck=dict(in_channels=[128, 256, 512, 1024]))

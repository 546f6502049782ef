# Agent Attention (arXiv 2312.08874), github.com/LeapLabTHU/Agent-Attention,
# downstream/segmentation/configs/agent_swin/upernet_agent_swin_t_9-12-14-7.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="agent_swin_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

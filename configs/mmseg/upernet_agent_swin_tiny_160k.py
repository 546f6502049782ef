# Agent Attention (arXiv 2312.08874).
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="agent_swin_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

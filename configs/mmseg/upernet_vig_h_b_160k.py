# ViG (arXiv 2405.18425). Its settings are not published; drop path is VMamba's.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vig_h_b", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

# FLatten (arXiv 2308.00442). Its settings are not published: Swin's.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="flatten_swin_base", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

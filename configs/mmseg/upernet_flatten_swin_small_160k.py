# FLatten (arXiv 2308.00442). Its settings are not published: Swin's.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="flatten_swin_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

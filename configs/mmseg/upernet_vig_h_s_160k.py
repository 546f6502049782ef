# ViG (arXiv 2405.18425). Its settings are not published; drop path is VMamba's.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vig_h_s", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

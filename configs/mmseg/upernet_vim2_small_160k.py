# MambaMixer (arXiv 2403.19888): VMamba's settings.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vim2_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# VMamba (arXiv 2401.10166).
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vmamba_tiny"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# EfficientVMamba (arXiv 2403.09977), section 5.3: VMamba's settings; drop path is its classifier's.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="efficient_vmamba_base", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

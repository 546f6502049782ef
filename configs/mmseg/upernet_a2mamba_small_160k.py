# A2Mamba (arXiv 2507.16624) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="a2mamba_small", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

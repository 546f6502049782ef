# STViT-R (arXiv 2303.08685) publishes no configuration of a segmenter: Swin's settings.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="stvit_r_swin_base", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

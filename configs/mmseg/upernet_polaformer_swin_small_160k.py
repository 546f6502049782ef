# PolaFormer (arXiv 2501.15061) publishes no configuration: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="polaformer_swin_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

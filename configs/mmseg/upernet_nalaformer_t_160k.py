# NaLaFormer (arXiv 2506.21137) publishes no configuration yet: Swin's settings, and the drop path of its classifier.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="nalaformer_t", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

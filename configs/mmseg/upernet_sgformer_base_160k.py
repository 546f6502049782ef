# SG-Former (arXiv 2308.12216). Its settings are not published: Swin's, and the drop path of its classifier.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="sgformer_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

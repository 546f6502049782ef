# DiNAT (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# segmentation/configs/dinat/upernet_dinat_small_512x512_160k_ade20k.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="dinat_small", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

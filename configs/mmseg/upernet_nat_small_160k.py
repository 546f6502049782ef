# NAT (arXiv 2204.07143), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# segmentation/configs/nat/upernet_nat_small_512x512_160k_ade20k.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="nat_small", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# NAT (arXiv 2204.07143), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# segmentation/configs/nat/upernet_nat_tiny_512x512_160k_ade20k.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="nat_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

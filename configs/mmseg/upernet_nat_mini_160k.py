# NAT (arXiv 2204.07143).
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="nat_mini"),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

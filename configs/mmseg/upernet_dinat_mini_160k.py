# DiNAT (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# segmentation/configs/dinat/upernet_dinat_mini_512x512_160k_ade20k.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="dinat_mini", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

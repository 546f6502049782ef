# VAN (arXiv 2202.09741), github.com/Visual-Attention-Network/VAN-Segmentation,
# configs/upernet/1k_pretrained/upernet_van_b0_512x512_160k_ade20k.py. The model's stages end in norms of their own.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="van_b0", drop_path_rate=0.1, norm_output=False),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160),
)

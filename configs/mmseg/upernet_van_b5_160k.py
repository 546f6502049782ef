# VAN (arXiv 2202.09741), github.com/Visual-Attention-Network/VAN-Segmentation,
# configs/upernet/22k_pretrained/upernet_van_b5_512x512_160k_ade20k_22k.py, from weights of ImageNet-22k. The model's
# stages end in norms of their own.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="van_b5", drop_path_rate=0.4, norm_output=False),
    decode_head=dict(in_channels=[96, 192, 480, 768]),
    auxiliary_head=dict(in_channels=480),
)

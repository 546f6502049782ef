# VAN (arXiv 2202.09741), github.com/Visual-Attention-Network/VAN-Segmentation,
# configs/upernet/1k_pretrained/upernet_van_b4_512x512_160k_ade20k.py. The model's stages end in norms of their own.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="van_b4", drop_path_rate=0.4, norm_output=False),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
train_dataloader = dict(batch_size=4)

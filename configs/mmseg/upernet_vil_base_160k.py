# Vision-LSTM (arXiv 2406.04303), src/vislstm/yamls/segmentation/vil_b16_upernet160k_dim384.yaml.
_base_ = "upernet_vil_small_160k.py"
width = 768
model = dict(
    backbone=dict(name="vil_base", drop_path_rate=0.1),
    neck=dict(embed_dim=width),
    decode_head=dict(in_channels=[width] * 4),
    auxiliary_head=dict(in_channels=width),
)

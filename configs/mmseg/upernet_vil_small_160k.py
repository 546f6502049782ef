# Vision-LSTM (arXiv 2406.04303), src/vislstm/yamls/segmentation/vil_s16_upernet160k_dim384.yaml.
_base_ = "upernet_vil_tiny_160k.py"
model = dict(
    backbone=dict(name="vil_small", drop_path_rate=0.05),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384, channels=384),
)

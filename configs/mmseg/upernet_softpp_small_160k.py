# SOFT++ (arXiv 2207.03341), github.com/fudan-zvg/SOFT, README.md names this training and publishes no configuration:
# Swin's settings, and the drop path of its classifier.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="softpp_small", drop_path_rate=0.1, norm_output=False),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

# MILA (arXiv 2405.16605), github.com/LeapLabTHU/MLLA, downstream/segmentation/configs/mlla/mlla_b_upernet.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mila_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

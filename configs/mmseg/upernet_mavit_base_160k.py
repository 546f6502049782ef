# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/Uper_b_2x.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mavit_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)

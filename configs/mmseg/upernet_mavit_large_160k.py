# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/Uper_l_2x.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mavit_large", drop_path_rate=0.55),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)

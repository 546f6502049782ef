# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/Uper_s_2x.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mavit_small", drop_path_rate=0.15),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)

# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/Uper_t_2x.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mavit_tiny", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

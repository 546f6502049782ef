# RALA (arXiv 2411.07635), github.com/qhfan/RALA, segmentation/configs/RALA/RALA_Uper_b_2x.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="ravlt_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)

# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/FPN_l_1x.py.
_base_ = "_base_/semantic_fpn_80k.py"
model = dict(backbone=dict(name="mavit_large", drop_path_rate=0.55), neck=dict(in_channels=[96, 192, 448, 640]))

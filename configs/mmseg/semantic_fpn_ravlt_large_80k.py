# RALA (arXiv 2411.07635), github.com/qhfan/RALA, segmentation/configs/RALA/RALA_FPN_l_1x.py.
_base_ = "_base_/semantic_fpn_80k.py"
model = dict(backbone=dict(name="ravlt_large", drop_path_rate=0.55), neck=dict(in_channels=[96, 192, 448, 640]))

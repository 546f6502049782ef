# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/retinanet_l_1x.py.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="ravlt_large", drop_path_rate=0.55), neck=dict(in_channels=[192, 448, 640]))

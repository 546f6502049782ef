# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/casrcnn_l_3x.py.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="ravlt_large", drop_path_rate=0.55), neck=dict(in_channels=[96, 192, 448, 640]))

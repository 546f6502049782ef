# MALA (arXiv 2507.00698), github.com/qhfan/MALA, detect/configs/MALA/maskrcnn_l_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="mavit_large", drop_path_rate=0.55), neck=dict(in_channels=[96, 192, 448, 640]))
optim_wrapper = dict(optimizer=dict(lr=0.0002))

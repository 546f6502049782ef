# MALA (arXiv 2507.00698), github.com/qhfan/MALA, detect/configs/MALA/maskrcnn_b_1x.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="mavit_base", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 512]))
optim_wrapper = dict(optimizer=dict(lr=0.0004))

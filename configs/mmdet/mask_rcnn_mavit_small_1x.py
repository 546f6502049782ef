# MALA (arXiv 2507.00698), github.com/qhfan/MALA, detect/configs/MALA/maskrcnn_s_1x.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="mavit_small", drop_path_rate=0.15), neck=dict(in_channels=[64, 128, 320, 512]))
optim_wrapper = dict(optimizer=dict(lr=0.0004))

# MALA (arXiv 2507.00698), github.com/qhfan/MALA, detect/configs/MALA/retinanet_t_1x.py.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="mavit_tiny", drop_path_rate=0.1), neck=dict(in_channels=[128, 256, 512]))
optim_wrapper = dict(optimizer=dict(lr=0.0004))

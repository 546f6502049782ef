# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/retinanet_s_1x.py.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="ravlt_small", drop_path_rate=0.15), neck=dict(in_channels=[128, 320, 512]))

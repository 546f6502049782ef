# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/retinanet_t_1x.py.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="ravlt_tiny", drop_path_rate=0.1), neck=dict(in_channels=[128, 256, 512]))

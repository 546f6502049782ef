# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/retinanet_m_1x.py.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="ravlt_base", drop_path_rate=0.4), neck=dict(in_channels=[192, 384, 512]))

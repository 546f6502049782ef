# RALA (arXiv 2411.07635), github.com/qhfan/RALA, detection/configs/RALA/maskrcnn_s_3x.py.
_base_ = "_base_/mask_rcnn_3x.py"
model = dict(backbone=dict(name="ravlt_small", drop_path_rate=0.15), neck=dict(in_channels=[64, 128, 320, 512]))

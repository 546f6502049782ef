# RALA (arXiv 2411.07635), github.com/qhfan/RALA, segmentation/configs/RALA/RALA_FPN_s_1x.py.
_base_ = "_base_/semantic_fpn_80k.py"
model = dict(backbone=dict(name="ravlt_small", drop_path_rate=0.15), neck=dict(in_channels=[64, 128, 320, 512]))

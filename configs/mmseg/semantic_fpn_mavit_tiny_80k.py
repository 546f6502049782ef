# MALA (arXiv 2507.00698), github.com/qhfan/MALA, segmentation/configs/MALA/FPN_t_1x.py.
_base_ = "_base_/semantic_fpn_80k.py"
model = dict(backbone=dict(name="mavit_tiny", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

# MILA (arXiv 2405.16605), github.com/LeapLabTHU/MLLA, downstream/detection/configs/mlla/mlla_s_mrcnn_1x.py.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="mila_small", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

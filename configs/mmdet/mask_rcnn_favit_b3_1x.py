# FaViT (arXiv 2312.08614), github.com/q2479036243/FaViT, detection/favit.py has the drop path; no configuration is
# published: PVT's settings.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="favit_b3", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768]))

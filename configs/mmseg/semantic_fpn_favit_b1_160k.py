# FaViT (arXiv 2312.08614), github.com/q2479036243/FaViT, segmentation/favit.py has the drop path; no configuration is
# published: PVT's settings over its 160,000 steps of 32 crops.
_base_ = "_base_/semantic_fpn_favit_160k.py"
model = dict(backbone=dict(name="favit_b1", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 256, 512]))

# RetinaNet with a PVT (arXiv 2102.12122), which gives the first stage's map too, though only the others are read.
_base_ = "retinanet_1x.py"
model = dict(backbone=dict(out_indices=(0, 1, 2, 3), norm_output=False), neck=dict(start_level=1))

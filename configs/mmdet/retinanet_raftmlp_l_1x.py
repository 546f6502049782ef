# RaftMLP (arXiv 2108.04384), github.com/okojoalg/raft-mlp, configs/detection/retinanet_raftmlp_l_fpn_1x_coco.py.
_base_ = "_base_/retinanet_pvt_1x.py"
model = dict(backbone=dict(name="raftmlp_l", drop_path_rate=0.0), neck=dict(in_channels=[128, 192, 512, 1024]))

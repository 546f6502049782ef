# RaftMLP (arXiv 2108.04384), github.com/okojoalg/raft-mlp, configs/detection/maskrcnn_raftmlp_m_fpn_1x_coco.py.
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="raftmlp_m", drop_path_rate=0.0), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(optimizer=dict(lr=0.0001))

# RaftMLP (arXiv 2108.04384), github.com/okojoalg/raft-mlp, configs/segmentation/fpn_raftmlp_m_512x512_40k_ade20k.py.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="raftmlp_m", drop_path_rate=0.0), neck=dict(in_channels=[96, 192, 384, 768]))

# RaftMLP (arXiv 2108.04384), github.com/okojoalg/raft-mlp, configs/segmentation/fpn_raftmlp_s_512x512_40k_ade20k.py.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="raftmlp_s", drop_path_rate=0.0), neck=dict(in_channels=[64, 128, 256, 512]))

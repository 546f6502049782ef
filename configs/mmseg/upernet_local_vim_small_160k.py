# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# segmentation/configs/local_mamba/upernet_local_vim-small_8xb2-160k_ade20k-512x512.py: as the tiny model's, whose
# directions of scans it has there, with weights that do not fit; here its own of both.
_base_ = "upernet_local_vim_tiny_160k.py"
model = dict(
    backbone=dict(name="local_vim_small"),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
)

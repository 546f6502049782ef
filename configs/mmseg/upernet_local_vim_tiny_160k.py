# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# segmentation/configs/local_mamba/upernet_local_vim-tiny_8xb2-160k_ade20k-512x512.py.
_base_ = "_base_/upernet_plain_160k.py"
model = dict(
    backbone=dict(
        name="local_vim_tiny", img_size=512, drop_path_rate=0.1, out_indices=(4, 9, 14, 19), norm_output=True
    ),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192, in_index=3),
)

# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# segmentation/configs/local_mamba/upernet_local_vssm_small_8xb2-160k_ade20k-512x512.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="local_vmamba_small", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

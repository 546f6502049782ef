# VMamba (arXiv 2401.10166), github.com/MzeroMiko/VMamba,
# segmentation/configs/vssm1/upernet_vssm_4xb4-160k_ade20k-512x512_base.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

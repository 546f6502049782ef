# VMamba (arXiv 2401.10166), github.com/MzeroMiko/VMamba,
# segmentation/configs/vssm/upernet_vssm_4xb4-160k_ade20k-512x512_base.py: the first version, with its default drop
# path.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vmamba_base_v0", drop_path_rate=0.1),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

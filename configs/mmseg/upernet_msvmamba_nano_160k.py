# MSVMamba (arXiv 2405.14174), github.com/YuHengsss/MSVMamba,
# segmentation/configs/ms_vssm/upernet_ms_vssm_4xb4-160k_ade20k-512x512_nano.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="msvmamba_nano", drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)

# MSVMamba (arXiv 2405.14174), github.com/YuHengsss/MSVMamba,
# segmentation/configs/ms_vssm/upernet_ms_vssm_4xb4-160k_ade20k-512x512_tiny.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="msvmamba_tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

# MSVMamba (arXiv 2405.14174), github.com/YuHengsss/MSVMamba,
# segmentation/configs/ms_vssm/upernet_ms_vssm_4xb4-160k_ade20k-512x512_micro.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="msvmamba_micro", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

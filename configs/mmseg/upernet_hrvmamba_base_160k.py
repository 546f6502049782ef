# HRVMamba (arXiv 2410.03174), github.com/zhanghao5201/HRVMamba,
# semantic_segmentation/configs/hrvmamba/hrvmamba_base_160k_ade20k-512x512_base.py, whose head reads the sums of the
# classifier's neck.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="hrvmamba_base", neck_features=True, drop_path_rate=0.15),
    decode_head=dict(in_channels=[128, 256, 512, 2048]),
    auxiliary_head=dict(in_channels=512),
)

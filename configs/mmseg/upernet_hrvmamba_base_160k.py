# HRVMamba (arXiv 2410.03174), github.com/zhanghao5201/HRVMamba,
# semantic_segmentation/configs/hrvmamba/hrvmamba_base_160k_ade20k-512x512_base.py. The published head reads the maps of
# the classifier's neck; this one reads the parallel maps themselves, with fewer channels.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="hrvmamba_base", drop_path_rate=0.15),
    decode_head=dict(in_channels=[80, 160, 320, 640]),
    auxiliary_head=dict(in_channels=320),
)

# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls,
# semantic_segmentation/configs/convnext_dcls/upernet_convnext_dcls_base_512_160k_ade20k_ss.py.
_base_ = "_base_/upernet_convnext_dcls_160k.py"
model = dict(
    backbone=dict(name="convnext_dcls_base", drop_path_rate=0.4),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

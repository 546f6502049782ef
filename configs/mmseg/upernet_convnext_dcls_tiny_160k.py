# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls,
# semantic_segmentation/configs/convnext_dcls/upernet_convnext_dcls_tiny_512_160k_ade20k_ss.py.
_base_ = "_base_/upernet_convnext_dcls_160k.py"
model = dict(
    backbone=dict(name="convnext_dcls_tiny", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
layers = [r"^stem\.|\.downsample\.", *[rf"^stages\.{stage}\." for stage in range(4)]]
optim_wrapper = dict(paramwise_cfg=dict(layers=[*layers, None, None]))  # two that are empty

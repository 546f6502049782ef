# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls,
# object_detection/configs/convnext_dcls/cascade_mask_rcnn_convnext_dcls_tiny_*_in1k.py.
_base_ = "_base_/cascade_mask_rcnn_convnext_dcls_3x.py"
model = dict(backbone=dict(name="convnext_dcls_tiny", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    paramwise_cfg=dict(
        layers=[
            r"^stem\.",
            r"^stages\.0\.",
            r"^stages\.1\.",
            r"^stages\.2\.(downsample|spacings|blocks\.[0-2])\.",
            r"^stages\.2\.blocks\.[3-5]\.",
            r"^stages\.2\.blocks\.[6-8]\.",
            r"^stages\.3\.",
        ]
    )
)

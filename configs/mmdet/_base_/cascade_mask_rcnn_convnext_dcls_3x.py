# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls, object_detection/configs/convnext_dcls: layers
# of three blocks each that learn the slower the lower they are; those of the first, second and last stage are one
# layer.
_base_ = "cascade_mask_rcnn_3x.py"
ends = [r"^stem\.", r"^stages\.0\.", r"^stages\.1\.", r"^stages\.3\."]
blocks = [rf"^stages\.2\.blocks\.({first}|{first + 1}|{first + 2})\." for first in range(3, 27, 3)]
optim_wrapper = dict(
    constructor="visionmix.LayerDecay",
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay=0.7,
        layers=[*ends[:3], r"^stages\.2\.(downsample|spacings|blocks\.[0-2])\.", *blocks, ends[3]],
    ),
)

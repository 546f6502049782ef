# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls, semantic_segmentation/configs/convnext_dcls: a
# layer for each stage and one for stem and downsamplers, under eight that are empty; a sliding window at test.
_base_ = "upernet_160k.py"
model = dict(test_cfg=dict(_delete_=True, mode="slide", crop_size=(512, 512), stride=(341, 341)))
layers = [r"^stem\.|\.downsample\.", *[rf"^stages\.{stage}\." for stage in range(4)]]
optim_wrapper = dict(
    constructor="visionmix.LayerDecay",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, layer_decay=0.9, layers=[*layers, *[None] * 8]),
)

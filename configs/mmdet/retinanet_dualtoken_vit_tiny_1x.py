# DualToken-ViT (arXiv 2309.12424) publishes no configuration: PVT's settings, and the drop path of its classifier; the
# three maps have strides of 8, 16 and 32.
_base_ = "_base_/retinanet_1x.py"
model = dict(
    backbone=dict(name="dualtoken_vit_tiny", drop_path_rate=0.1, out_indices=(0, 1, 2), norm_output=False),
    neck=dict(in_channels=[64, 128, 256]),
)

# TransNeXt (arXiv 2311.17132), github.com/DaiShiResearch/TransNeXt,
# detection/maskrcnn/configs/mask_rcnn_transnext_small_fpn_1x_coco.py.
# The published backbone computes its position biases for images of 800 pixels and resamples them; this one computes
# them for each image's own size, which its author calls extrapolation.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="transnext_small", drop_path_rate=0.6), neck=dict(in_channels=[72, 144, 288, 576]))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "local_bias": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
        }
    )
)

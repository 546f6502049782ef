# Mask R-CNN with TransNeXt (arXiv 2311.17132): its temperatures and learned addends are not decayed.
# The published backbone computes its position biases for images of 800 pixels and resamples them; this one computes
# them for each image's own size, which its author calls extrapolation.
_base_ = "mask_rcnn_1x.py"
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "local_bias": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
        }
    )
)

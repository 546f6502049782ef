# Vim (arXiv 2401.09417), github.com/hustvl/Vim,
# det/projects/ViTDet/configs/COCO/cascade_mask_rcnn_vimdet_t_100ep_adj1.py: layers that learn the slower the lower they
# are. Its weights are of a model without a class token, which are not published.
_base_ = "_base_/cascade_mask_rcnn_vitdet_100e.py"
model = dict(
    backbone=dict(name="vim_tiny", out_indices=(23,), norm_output=False),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(
    constructor="visionmix.LayerDecay",
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(_delete_=True, layer_decay=0.837),
)

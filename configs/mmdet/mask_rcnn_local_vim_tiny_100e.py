# LocalMamba (arXiv 2403.09338), github.com/hunto/LocalMamba,
# detection/configs/local_mamba/vitdet_cascade_mask-rcnn_local_vim_tiny_lsj-100e.py, which is no cascade. Its decay by
# layers finds no layers under their names: only stem and position embedding learn slowly, at 0.7^13 of the rate.
_base_ = "_base_/mask_rcnn_vitdet_100e.py"
model = dict(
    backbone=dict(name="local_vim_tiny", out_indices=(19,)),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True,
            **{
                "model.stem": dict(lr_mult=0.7**13),
                "model.pos_embed": dict(lr_mult=0.7**13, decay_mult=0.0),
            },
        ),
    ),
    clip_grad=dict(max_norm=35, norm_type=2),
)

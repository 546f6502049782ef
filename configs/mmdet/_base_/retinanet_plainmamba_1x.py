# RetinaNet with PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmdetection/plain_mamba_det_configs: an adapter beside the model, batch norms in the FPN.
_base_ = "retinanet_1x.py"
custom_imports = dict(imports=["visionmix.integrations.adapter"])
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionmix.Adapter",
        pretrained=True,
        out_indices=(1, 2, 3),
        norm_cfg=norm_cfg,
    ),
    neck=dict(add_extra_convs="on_output", norm_cfg=norm_cfg),
)
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys=dict.fromkeys(("level_embed", "pos_embed", "norm", "bias", ".A_log", ".D", ".move_B"), no_decay)
    ),
    clip_grad=dict(max_norm=35, norm_type=2),
)
sync_bn = "torch"

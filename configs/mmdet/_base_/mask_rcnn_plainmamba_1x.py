# Mask R-CNN with PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmdetection/plain_mamba_det_configs: an adapter beside the model, batch norms in FPN and boxes' head.
_base_ = "mask_rcnn_1x.py"
custom_imports = dict(imports=["visionmix.integrations.adapter"])
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type="visionmix.Adapter",
        pretrained=True,
        norm_cfg=norm_cfg,
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=norm_cfg)),
)
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
no_decay = dict(decay_mult=0.0)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True,
            **dict.fromkeys(("level_embed", "pos_embed", "norm", "bias", ".A_log", ".D", ".move_B"), no_decay),
        )
    )
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
sync_bn = "torch"

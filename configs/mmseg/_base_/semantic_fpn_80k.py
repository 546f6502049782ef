# Semantic FPN on ADE20K, 80,000 steps of 16 crops of 512 pixels (8 GPUs x 2), by PVT's settings (arXiv 2102.12122): a
# polynomial decay, no warm-up.
_base_ = "upernet_160k.py"
model = dict(
    neck=dict(type="FPN", out_channels=256, num_outs=4),
    decode_head=dict(
        _delete_=True,
        type="FPNHead",
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
    auxiliary_head=None,
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4), paramwise_cfg=dict(_delete_=True)
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))

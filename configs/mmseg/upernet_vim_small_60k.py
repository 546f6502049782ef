# Vim (arXiv 2401.09417), github.com/hustvl/Vim, seg/configs/vim/upernet/upernet_vim_small_24_512_slide_60k.py and
# seg/scripts: 64 crops a step (8 GPUs x 8), layers that learn the slower the lower they are, a sliding window at test.
_base_ = "_base_/upernet_plain_160k.py"
model = dict(
    backbone=dict(name="vim_small", drop_path_rate=0.0),
    neck=dict(type="Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(_delete_=True, mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(
    constructor="visionmix.LayerDecay",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, layer_decay=0.95),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000)

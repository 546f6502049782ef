# Vision-LSTM (arXiv 2406.04303), github.com/NX-AI/vision-lstm, src/vislstm/yamls/segmentation: 16 crops a step, layers
# that learn the slower the lower they are (two blocks there are one here), a sliding window at test; this is
# vil_t16_upernet160k_dim192.yaml. It reads the maps after blocks 8, 12, 16 and 24 of 24, of which a pair is a block
# here. Its jitter of colours is mmseg's here.
_base_ = "_base_/upernet_plain_160k.py"
model = dict(
    backbone=dict(name="vil_tiny", drop_path_rate=0.0, out_indices=(3, 5, 7, 11)),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192, channels=192),
    test_cfg=dict(_delete_=True, mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    constructor="visionmix.LayerDecay",
    optimizer=dict(lr=5e-4, weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, layer_decay=0.65),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1500, end=160000, by_epoch=False),
]

# PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmdetection/plain_mamba_det_configs/retinanet/l3_retinanet_1x.py.
_base_ = "_base_/retinanet_plainmamba_1x.py"
model = dict(
    backbone=dict(name="plainmamba_l3", num_heads=8, drop_path_rate=0.3),
    neck=dict(in_channels=[448] * 3),
)

# PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmdetection/plain_mamba_det_configs/maskrcnn/l3_maskrcnn_1x.py.
_base_ = "_base_/mask_rcnn_plainmamba_1x.py"
model = dict(
    backbone=dict(name="plainmamba_l3", num_heads=8, drop_path_rate=0.3),
    neck=dict(in_channels=[448] * 4),
)

# PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmdetection/plain_mamba_det_configs/maskrcnn/l1_maskrcnn_1x.py.
_base_ = "_base_/mask_rcnn_plainmamba_1x.py"
model = dict(
    backbone=dict(name="plainmamba_l1", num_heads=6, drop_path_rate=0.1),
    neck=dict(in_channels=[192] * 4),
)

# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls,
# object_detection/configs/convnext_dcls/cascade_mask_rcnn_convnext_dcls_small_*_in1k.py.
_base_ = "_base_/cascade_mask_rcnn_convnext_dcls_3x.py"
model = dict(backbone=dict(name="convnext_dcls_small", drop_path_rate=0.6), neck=dict(in_channels=[96, 192, 384, 768]))

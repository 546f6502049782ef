# ConvNeXt-dcls (arXiv 2112.03740), github.com/K-H-Ismail/ConvNeXt-dcls,
# object_detection/configs/convnext_dcls/cascade_mask_rcnn_convnext_dcls_base_*_in1k.py.
_base_ = "_base_/cascade_mask_rcnn_convnext_dcls_3x.py"
model = dict(backbone=dict(name="convnext_dcls_base", drop_path_rate=0.7), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.8))

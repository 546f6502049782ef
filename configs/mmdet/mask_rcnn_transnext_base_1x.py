# TransNeXt (arXiv 2311.17132), github.com/DaiShiResearch/TransNeXt,
# detection/maskrcnn/configs/mask_rcnn_transnext_base_fpn_1x_coco.py.
_base_ = "_base_/mask_rcnn_transnext_1x.py"
model = dict(backbone=dict(name="transnext_base", drop_path_rate=0.7), neck=dict(in_channels=[96, 192, 384, 768]))

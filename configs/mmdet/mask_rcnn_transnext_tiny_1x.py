# TransNeXt (arXiv 2311.17132), github.com/DaiShiResearch/TransNeXt,
# detection/maskrcnn/configs/mask_rcnn_transnext_tiny_fpn_1x_coco.py.
_base_ = "_base_/mask_rcnn_transnext_1x.py"
model = dict(backbone=dict(name="transnext_tiny", drop_path_rate=0.4), neck=dict(in_channels=[72, 144, 288, 576]))

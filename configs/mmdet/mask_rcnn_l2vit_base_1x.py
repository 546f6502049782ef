# L2ViT (arXiv 2501.16182), github.com/ChuanyangZheng/L2ViT,
# object_detection/configs/L2ViT/maskrcnn_1x_l2vit_v0_base_coco.py.
_base_ = "_base_/mask_rcnn_l2vit_1x.py"
model = dict(backbone=dict(name="l2vit_base", drop_path_rate=0.2), neck=dict(in_channels=[128, 256, 512, 1024]))

# L2ViT (arXiv 2501.16182), github.com/ChuanyangZheng/L2ViT,
# object_detection/configs/L2ViT/retinanet_3x_l2vit_v0_tiny_coco.py.
_base_ = "_base_/retinanet_l2vit_3x.py"
model = dict(backbone=dict(name="l2vit_tiny", drop_path_rate=0.2), neck=dict(in_channels=[192, 384, 768]))

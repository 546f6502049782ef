# Vim (arXiv 2401.09417), github.com/hustvl/Vim, det/projects/ViTDet/configs/COCO/cascade_mask_rcnn_vimdet_s_100ep.py:
# as the tiny model's.
_base_ = "cascade_mask_rcnn_vim_tiny_100e.py"
model = dict(backbone=dict(name="vim_small"), neck=dict(in_channels=384))

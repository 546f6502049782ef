# STViT-R (arXiv 2303.08685), github.com/changsn/STViT-R-Object-Detection,
# configs/swin/cascade_mask_rcnn_swin_small_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_coco.py. There semantic
# tokens are formed and read within windows of 14, 21 and 27 cells; here as in the classifier.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="stvit_r_swin_small", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))

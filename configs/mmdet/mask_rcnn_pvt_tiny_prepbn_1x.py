# SLAB (arXiv 2405.11582), github.com/xinghaochen/SLAB,
# detection/configs/pvt/mask_rcnn_pvt_t_prepbn_fpn_1x_coco.py. The file of its backbone is missing there; drop path is
# that of PVT's own detector (arXiv 2102.12122).
_base_ = "_base_/mask_rcnn_pvt_1x.py"
model = dict(backbone=dict(name="pvt_tiny_prepbn", drop_path_rate=0.1), neck=dict(in_channels=[64, 128, 320, 512]))
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))

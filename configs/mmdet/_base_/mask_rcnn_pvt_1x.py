# Mask R-CNN with a PVT (arXiv 2102.12122): no norms after the maps, another learning rate and decay.
_base_ = "mask_rcnn_1x.py"
model = dict(backbone=dict(norm_output=False))
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4), paramwise_cfg=dict(_delete_=True))

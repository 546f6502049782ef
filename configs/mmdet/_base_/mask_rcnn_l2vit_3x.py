# Mask R-CNN with L2ViT (arXiv 2501.16182), 36 epochs: weight decay is for all parameters there, those of norms too.
_base_ = "mask_rcnn_3x.py"
optim_wrapper = dict(paramwise_cfg=None)

# Mask R-CNN with L2ViT (arXiv 2501.16182), 12 epochs: weight decay is for all parameters there, those of norms too.
_base_ = "mask_rcnn_multiscale_1x.py"
optim_wrapper = dict(paramwise_cfg=None)

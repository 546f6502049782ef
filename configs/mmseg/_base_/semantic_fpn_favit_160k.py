# Semantic FPN with FaViT (arXiv 2312.08614), github.com/q2479036243/FaViT, segmentation/configs/_base_: 160,000 steps
# of 32 crops (8 GPUs x 4).
_base_ = "semantic_fpn_pvt_80k.py"
train_dataloader = dict(batch_size=4)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=160000, by_epoch=False)]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))

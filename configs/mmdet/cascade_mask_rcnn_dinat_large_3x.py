# DiNAT (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# detection/configs/dinat/cascade_mask_rcnn_dinat_large_3x_coco.py.
_base_ = "_base_/cascade_mask_rcnn_3x.py"
model = dict(backbone=dict(name="dinat_large", drop_path_rate=0.6), neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-05))

# L2ViT (arXiv 2501.16182), github.com/ChuanyangZheng/L2ViT,
# semantic_segmentation/configs/novel/upernet_l2vit_small_512x512_160k_ade20k.py. All parameters are decayed.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="l2vit_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=None)

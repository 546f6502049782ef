# Vim (arXiv 2401.09417), github.com/hustvl/Vim, seg/configs/vim/upernet/upernet_vim_small_24_512_slide_60k.py:
# as the tiny model's.
_base_ = "upernet_vim_tiny_60k.py"
model = dict(
    backbone=dict(name="vim_small"),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.95))

# Mamba-R (arXiv 2405.14858) publishes no configuration of a segmenter: Vim's settings.
_base_ = "upernet_vim_small_60k.py"
width = 1024
model = dict(
    backbone=dict(name="mambar_large", out_indices=(11, 23, 35, 47)),
    neck=dict(embed_dim=width),
    decode_head=dict(in_channels=[width] * 4, channels=width),
    auxiliary_head=dict(in_channels=width),
)

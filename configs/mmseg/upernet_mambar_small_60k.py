# Mamba-R (arXiv 2405.14858) publishes no configuration of a segmenter: Vim's settings.
_base_ = "upernet_vim_small_60k.py"
model = dict(backbone=dict(name="mambar_small"))

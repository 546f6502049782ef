# UperNet with a model of one resolution, of which it reads the maps after every sixth of 24 blocks.
_base_ = "upernet_160k.py"
model = dict(backbone=dict(out_indices=(5, 11, 17, 23), norm_output=False, one_stride=True))

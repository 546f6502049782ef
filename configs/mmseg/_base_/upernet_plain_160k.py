# UperNet with a model of one resolution, of which it reads the maps after every sixth of 24 blocks. PlainMamba's
# published code also puts the model's last norm after the last map; here no norm follows.
_base_ = "upernet_160k.py"
model = dict(backbone=dict(out_indices=(5, 11, 17, 23), norm_output=False, one_stride=True))

# VSSD (arXiv 2407.18559), github.com/YuHengsss/VSSD, README.md; drop path as in classification.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="vssd_micro", drop_path_rate=0.2),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)

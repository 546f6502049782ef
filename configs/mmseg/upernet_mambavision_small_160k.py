# MambaVision (arXiv 2407.08083), github.com/NVlabs/MambaVision,
# semantic_segmentation/configs/mamba_vision/mamba_vision_160k_ade20k-512x512_small.py. Its own drop_path_rate does not
# reach the model, whose default is in force.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mambavision_small", drop_path_rate=0.2, window_sizes=(160, 56)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

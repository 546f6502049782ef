# MambaVision (arXiv 2407.08083), github.com/NVlabs/MambaVision,
# semantic_segmentation/configs/mamba_vision/mamba_vision_160k_ade20k-512x512_base.py. Its own drop_path_rate does not
# reach the model, whose default is in force.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="mambavision_base", drop_path_rate=0.2, window_sizes=(64, 32)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))

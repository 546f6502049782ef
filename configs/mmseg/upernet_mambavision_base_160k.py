# MambaVision (arXiv 2407.08083), github.com/NVlabs/MambaVision,
# semantic_segmentation/configs/mamba_vision/mamba_vision_160k_ade20k-512x512_base.py: the settings of the tiny model.
_base_ = "upernet_mambavision_tiny_160k.py"
model = dict(
    backbone=dict(name="mambavision_base"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

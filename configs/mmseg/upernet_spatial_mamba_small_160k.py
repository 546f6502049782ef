# Spatial-Mamba (arXiv 2410.15091), github.com/EdwardChasel/Spatial-Mamba,
# segmentation/configs/spatialmamba/upernet_spatialmamba_4xb4-160k_ade20k-512x512_small.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="spatial_mamba_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)

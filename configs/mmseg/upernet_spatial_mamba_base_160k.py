# Spatial-Mamba (arXiv 2410.15091), github.com/EdwardChasel/Spatial-Mamba,
# segmentation/configs/spatialmamba/upernet_spatialmamba_4xb4-160k_ade20k-512x512_base.py.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="spatial_mamba_base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)

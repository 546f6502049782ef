# TransNeXt (arXiv 2311.17132), github.com/DaiShiResearch/TransNeXt,
# segmentation/upernet/configs/upernet_transnext_small_512x512_160k_ade20k_ms_extrapolation.py, tested at one scale.
_base_ = "_base_/upernet_transnext_160k.py"
model = dict(
    backbone=dict(name="transnext_small", drop_path_rate=0.6),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
)

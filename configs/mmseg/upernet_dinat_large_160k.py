# DiNAT (arXiv 2209.15001), github.com/SHI-Labs/Neighborhood-Attention-Transformer,
# segmentation/configs/dinat/upernet_dinat_large_640x640_160k_ade20k.py, from weights of ImageNet-22k; in spite of its
# name its crops are of 512 pixels.
_base_ = "_base_/upernet_160k.py"
model = dict(
    backbone=dict(name="dinat_large", drop_path_rate=0.3, pretrained_cfg="in22k"),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)

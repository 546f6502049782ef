# PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmsegmentation/plain_mamba_seg_configs/l1_upernet.py.
_base_ = "_base_/upernet_plain_160k.py"
model = dict(
    backbone=dict(name="plainmamba_l1", drop_path_rate=0.1, out_indices=(5, 11, 17, 23)),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192, in_index=3),
)

# PlainMamba (arXiv 2403.17695), github.com/ChenhongyiYang/PlainMamba,
# downstream/mmsegmentation/plain_mamba_seg_configs/l3_upernet.py.
_base_ = "_base_/upernet_plain_160k.py"
model = dict(
    backbone=dict(name="plainmamba_l3", drop_path_rate=0.3, out_indices=(8, 17, 26, 35)),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_channels=448, in_index=3),
)

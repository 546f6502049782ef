# VAN (arXiv 2202.09741), github.com/Visual-Attention-Network/VAN-Segmentation,
# configs/sem_fpn/fpn_van_b2_ade20k_40k.py: batch 32 = 8 GPUs x 4. Stages end in norms of the model's own.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="van_b2", drop_path_rate=0.2), neck=dict(in_channels=[64, 128, 320, 512]))
train_dataloader = dict(batch_size=4)

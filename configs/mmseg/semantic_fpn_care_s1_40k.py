# CARE (arXiv 2411.16170) publishes no configuration: PVTv2's settings, and the drop path of its classifier.
_base_ = "_base_/semantic_fpn_pvt_40k.py"
model = dict(backbone=dict(name="care_s1", drop_path_rate=0.1), neck=dict(in_channels=[32, 64, 128, 256]))
train_dataloader = dict(batch_size=4)

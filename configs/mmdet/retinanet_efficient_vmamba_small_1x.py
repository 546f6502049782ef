# EfficientVMamba (arXiv 2403.09977), section 5.2: PVT's settings, and its own drop path.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="efficient_vmamba_small", drop_path_rate=0.2), neck=dict(in_channels=[128, 256, 512]))

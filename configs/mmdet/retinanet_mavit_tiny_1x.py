# MAViT (arXiv 2507.00698). The learning rate is that of its published configuration.
_base_ = "_base_/retinanet_1x.py"
model = dict(backbone=dict(name="mavit_tiny", drop_path_rate=0.1), neck=dict(in_channels=[128, 256, 512]))
optim_wrapper = dict(optimizer=dict(lr=4e-4))

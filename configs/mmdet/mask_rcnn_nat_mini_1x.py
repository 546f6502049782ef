# NAT (arXiv 2204.07143).
# Its paper trains for 36 epochs with images resized at random; this is the schedule of the others.
_base_ = "_base_/mask_rcnn_1x.py"
model = dict(backbone=dict(name="nat_mini"), neck=dict(in_channels=[64, 128, 256, 512]))

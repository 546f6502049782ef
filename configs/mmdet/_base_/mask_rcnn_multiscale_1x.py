# Mask R-CNN on COCO for 12 epochs, with images of as many sizes as longer schedules have.
_base_ = "mask_rcnn_3x.py"
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

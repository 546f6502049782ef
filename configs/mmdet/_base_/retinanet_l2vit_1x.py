# RetinaNet with L2ViT (arXiv 2501.16182), 12 epochs: images of many sizes and the weight decay of its Mask R-CNN.
_base_ = ["retinanet_1x.py", "multiscale.py"]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    {{_base_.resizes}},
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))

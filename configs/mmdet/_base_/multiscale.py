# Images of many sizes, as DETR has them and, after it, Swin (arXiv 2103.14030): half of them are cut before.
sizes = [(short, 1333) for short in range(480, 801, 32)]
resizes = dict(
    type="RandomChoice",
    transforms=[
        [dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True)],
        [
            dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
            dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
            dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True),
        ],
    ],
)

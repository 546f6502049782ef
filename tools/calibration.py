"""Layers that are fitted to data, before a run's first step."""

import numpy as np

from visionmix.tools import data
from visionmix.tools.trainer import Trainer


def calibrate(trainer: Trainer, dataset: data.ImageSet) -> int:
    """Fit the layers of the model that are fitted to data to images of the training set, and return how many there are.

    The images are `train.calibrate` of them, from the first to the last at equal distances, augmented as in training.
    They are the same in every process, and so is what is learned. Nothing is done where the model has no such layers
    (`fitted_layers`), or published weights have brought fitted ones.

    Raises:
        UnreadableData: none of the images can be read.
    """
    wanted = trainer.recipe
    layers = getattr(trainer.model, "fitted_layers", list)()
    if not layers or not wanted.train.calibrate or wanted.model.pretrained:
        return 0
    size = wanted.data.sizes[0][1] if wanted.data.sizes else 0
    places = np.unique(np.linspace(0, len(dataset) - 1, wanted.train.calibrate).astype(int))
    batch = data.collate([dataset[data.Key(0, int(place), 0, size)] for place in places])
    if not len(batch.targets):
        raise data.UnreadableData(f"the layers cannot be fitted: {', '.join(batch.unreadable[:3])} cannot be read")
    with data.Repeatable(wanted.train.seed, len(layers)):
        images = trainer.finish_batch(batch).to(trainer.dtype, memory_format=trainer.layout)
        trainer.model.calibrate(images)
    if trainer.ema:
        averages = dict(trainer.ema.module.named_buffers())
        for name, value in trainer.model.named_buffers():
            averages[name].copy_(value)
    return len(layers)

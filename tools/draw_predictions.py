"""Draw the predictions of a trained detector or segmentation model for test images, beside the truth.

    python tools/draw_predictions.py output/trees/trees.py output/trees/iter_800.pth --out trees.png

The first argument is the config that training left in its work dir.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from visionmix.tools import openmmlab
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.pictures import INK, TEST, TRAIN, new_figure, save

SCORE = 0.4  # the least that a box must have to be drawn


def predict(config: Any, checkpoint: Path, count: int) -> list[tuple[np.ndarray, Any]]:
    """Return `count` test images in RGB, spread over the set, each with the data sample of its truth and prediction.

    Raises:
        ValueError: the checkpoint holds other weights than the config's model.
    """
    from mmengine.config import ConfigDict
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS, MODELS, init_default_scope
    from mmengine.runner import load_checkpoint

    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    try:
        load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not hold the weights of the config's model: {error}") from error
    model.eval()
    dataset = DATASETS.build(ConfigDict(config.val_dataloader.dataset))
    drawn = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int):
        batch = pseudo_collate([dataset[index]])
        image = batch["inputs"][0].numpy()[::-1].transpose(1, 2, 0)
        (sample,) = model.test_step(batch)
        drawn.append((image, sample))
    return drawn


def draw(drawn: list[tuple[np.ndarray, Any]], path: Path, title: str) -> None:
    """Draw a column per image: the truth above, the prediction below."""
    columns = len(drawn)
    figure = new_figure(2.4 * columns, 5.2)
    axes = figure.subplots(2, columns, squeeze=False)
    for column, (image, sample) in enumerate(drawn):
        for row, truth in enumerate((True, False)):
            panel = axes[row, column]
            panel.imshow(image)
            panel.set(xticks=[], yticks=[])
            draw_found(panel, sample, truth)
    axes[0, 0].set_ylabel("truth", color=INK)
    axes[1, 0].set_ylabel("prediction", color=INK)
    figure.suptitle(title)
    save(figure, path)


def draw_found(panel: Any, sample: Any, truth: bool) -> None:
    """Draw the boxes, or the outlines of the first class that is not background, of one data sample."""
    from matplotlib.patches import Rectangle

    colour = TRAIN if truth else TEST
    if "gt_sem_seg" in sample:
        labels = (sample.gt_sem_seg if truth else sample.pred_sem_seg).data[0].cpu().numpy()
        panel.contour(labels == 1, levels=[0.5], colors=[colour], linewidths=1.2)
        return
    found = sample.gt_instances if truth else sample.pred_instances
    boxes = found.bboxes if truth else found.bboxes[found.scores >= SCORE]
    for left, top, right, bottom in np.asarray(getattr(boxes, "tensor", boxes)):
        panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))


def main(argv: list[str] | None = None) -> int:
    """Run the `draw-predictions` command with these arguments."""
    parser = argparse.ArgumentParser(
        prog="visionmix draw-predictions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config of the trained model")
    parser.add_argument("checkpoint", type=Path, help="checkpoint that training left")
    parser.add_argument("--data", help="folder of the data set, in place of the config's data_root")
    parser.add_argument("--count", type=int, default=4, help="images (default: %(default)s)")
    parser.add_argument("--title", default="", help="title of the picture")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    try:
        check_least(1, count=args.count)
        check_out(args.out)
    except ValueError as error:
        parser.error(str(error))
    if not openmmlab.installed():
        print(f"draw_predictions: {openmmlab.INSTALL}", file=sys.stderr)
        return 2
    try:
        drawn = predict(openmmlab.read(args.config, args.data), args.checkpoint, args.count)
    except (OSError, ValueError) as error:
        print(f"draw_predictions: {error}", file=sys.stderr)
        return 1
    draw(drawn, args.out, args.title)
    return 0


if __name__ == "__main__":
    sys.exit(main())

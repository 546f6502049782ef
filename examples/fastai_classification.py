"""Fine-tune a visionmix model with fastai.

python examples/fastai_classification.py                                      # a tiny model, random images
python examples/fastai_classification.py --model vmamba_tiny --pretrained --data flowers/train --epochs 5
"""

import argparse
import tempfile
from pathlib import Path

import numpy
import timm
from fastai.vision.all import ImageDataLoaders, Learner, Normalize, Resize, accuracy, params
from PIL import Image
from torch import nn

import visionmix  # noqa: F401  registers the models with timm


def random_images(folder: Path) -> Path:
    """Write twelve random pictures of two classes below `folder`."""
    for number in range(12):
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(numpy.random.randint(0, 255, (72, 80, 3), dtype=numpy.uint8)).save(path)
    return folder


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return two groups of parameters: those that `fine_tune` freezes at first, and the head's."""
    head = params(model.head)
    return [[each for each in params(model) if all(each is not other for other in head)], head]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vmamba")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights")
    parser.add_argument("--data", help="folder with a folder of images per class; random images without it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    cfg = timm.get_pretrained_cfg(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data) if args.data else random_images(Path(scratch))
        loaders = ImageDataLoaders.from_folder(
            folder, valid_pct=0.3, seed=0, item_tfms=Resize(cfg.input_size[1:]), bs=args.batch, num_workers=0,
            batch_tfms=Normalize.from_stats(cfg.mean, cfg.std),
        )  # fmt: skip
        model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=loaders.c)
        learner = Learner(loaders, model, splitter=body_and_head, metrics=accuracy)
        learner.fine_tune(args.epochs)  # the head alone for one epoch, then everything
        loss, right = learner.validate()
    print(f"{args.model}: loss {loss:.3f}, accuracy {right:.2f}")


if __name__ == "__main__":
    main()

"""What tools that draw need: a model with its weights, and images as it sees them and as people do."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visionmix.tools import data, demo_data, models
from visionmix.tools.images import read_rgb

IMAGES = f"a file, or one of {', '.join(demo_data.PHOTOGRAPHS)}"


@dataclass
class Shown:
    """A model in eval mode, and images for it.

    Attributes:
        model: The model.
        images: Normalised (batch, 3, height, width).
        pictures: The same without normalisation, float (batch, height, width, 3) in [0, 1].
    """

    model: nn.Module
    images: Tensor
    pictures: np.ndarray


def add_weights(parse: argparse.ArgumentParser) -> None:
    """Add the options that say where a model's weights come from."""
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument("--checkpoint", help="weights: .pt, .pth or .safetensors")


def add_models(parse: argparse.ArgumentParser) -> None:
    """Add models side by side and the options that say where their weights come from."""
    parse.add_argument("models", nargs="+", metavar="MODEL", help="names that timm knows")
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument("--checkpoint", action="append", help="weights of a model: .pt, .pth or .safetensors")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels (default: the model's own)")


def read_models(parse: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list]:
    """Return the arguments in `argv`, and the file with the weights of each model, None where it has none.

    Models that bear one name are told apart by their files' folders. Ends the program where there are not as many files
    as models, or two models are the same.
    """
    args = parse.parse_args(argv)
    files = args.checkpoint or [None] * len(args.models)
    if len(files) != len(args.models):
        parse.error(f"--checkpoint is given {len(files)} times for {len(args.models)} models; give one for each")
    if args.img_size is not None and args.img_size < 1:
        parse.error(f"--img-size {args.img_size} is no size; give 1 or more pixels")
    return args, files


def labels(names: Sequence[str], files: Sequence[str | None]) -> list[str]:
    """Return what to call each model in a picture: its name, or where another has the name, its file's folder.

    Raises:
        ValueError: two are the same.
    """
    several = {name for name in names if names.count(name) > 1}
    found = [
        Path(file).absolute().parent.name if name in several and file else name
        for name, file in zip(names, files, strict=True)
    ]
    for label in found:
        if found.count(label) > 1:
            raise ValueError(f"{label!r} is named twice; give each model once, with weights of its own folder")
    return found


def load(name: str | None, pretrained: bool = False, checkpoint: str | None = None) -> nn.Module:
    """Return the model called `name` in eval mode, with random weights from seed 0 where none are given.

    A checkpoint of train knows its model: `name` may be None.

    Raises:
        ValueError: the model is unknown, or the weights are not its own.
        OSError: there is no such file.
    """
    if pretrained or checkpoint:
        given = {"name": name, "pretrained": pretrained}
        return models.load_trained(checkpoint, **given, device=torch.device("cpu")).model
    if name is None:
        raise ValueError("no model is named, and no checkpoint says which it holds; give a name")
    torch.manual_seed(0)
    return models.create_model(name).eval()


def show(model: nn.Module, names: Sequence[str], image_size: int | None = None) -> Shown:
    """Return the images called `names`, resized and cut for `model`, which is set to their size.

    Args:
        model: A model in eval mode.
        names: Files, or photographs that come with scikit-image.
        image_size: Side of the images in pixels; None for the model's own.

    Raises:
        ValueError: the model does not take images of this size.
        OSError: there is no such image.
        ModuleNotFoundError: a photograph is asked for, and scikit-image is not installed.
    """
    settings = models.model_input(model, image_size=image_size)
    if image_size is not None:
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=image_size)
        models.check_input(model, type(model).__name__, image_size, torch.device("cpu"))
    transform = data.eval_transform(settings.image_size, settings.interpolation, 1.0, settings.normalise)
    images = torch.stack([transform(open_image(name)) for name in names])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return Shown(model, images, pictures)


def open_image(name: str) -> Image.Image:
    """Return the RGB image of a file, or the photograph of this name that comes with scikit-image."""
    if name in demo_data.PHOTOGRAPHS and not Path(name).exists():
        return demo_data.open_photograph(demo_data.photograph_folder() / demo_data.PHOTOGRAPHS[name])
    return read_rgb(name)

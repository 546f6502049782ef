"""Models for the tools: made by timm, checked against the images they are to see, with weights from any source."""

import ast
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn

from visionmix import models, reduction
from visionmix.registry import close_matches
from visionmix.tools import checkpoint


@dataclass
class Input:
    """The images a model is tested on: side in pixels, resizing, and the mean and std of normalisation."""

    image_size: int
    interpolation: str
    crop_pct: float
    mean: list[float]
    std: list[float]

    @property
    def normalise(self) -> dict[str, tuple[float, ...]]:
        """Mean and std as timm's transforms take them."""
        return {"mean": tuple(self.mean), "std": tuple(self.std)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Return `timm.create_model(name, **kwargs)`.

    Raises:
        ValueError: at an unknown name, with the nearest ones, or at an argument that the model does not take.
    """
    if not timm.is_model(name.split(".")[0]):
        close = close_matches(name, timm.list_models(), 3, 0.4)
        raise ValueError(
            f"model={name!r} is not known; did you mean {', '.join(close) or 'one of timm.list_models()'}?"
        )
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take these arguments: {error}") from error


def reduce_model(model: nn.Module, spec: str, **options: Any) -> nn.Module:
    """Return `model` reduced as `spec` says: a method, then behind a colon its options, ``tome:r=(13, -1.0)``.

    Args:
        model: What `visionmix.reduction.apply` takes.
        spec: The method and its options as Python literals, commas between them.
        **options: More options.

    Raises:
        TypeError: the model cannot be reduced.
        ValueError: `spec` cannot be read, or the method refuses it.
    """
    method, _, text = spec.partition(":")
    try:
        call = ast.parse(f"method({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("every option needs its name")
        options |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the reduction {spec!r} cannot be read ({error}); write it as tome:r=13") from error
    return reduction.apply(model, method, **options)


def check_input(model: nn.Module, name: str, image_size: int, device: torch.device) -> None:
    """Raise ValueError when the model cannot take RGB images of this size, before any work is done."""
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model {name!r} does not take RGB images of image_size={image_size}: {error}; "
            f"build it for them, e.g. --set model.kwargs.img_size={image_size}"
        ) from error
    finally:
        model.train(training)


def model_input(model: nn.Module, **given: Any) -> Input:
    """Return the model's own input settings, those in `given` that are not None laid over them."""
    config = resolve_data_config({}, model=model)
    own = {
        "image_size": config["input_size"][-1],
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    return Input(**own | {key: value for key, value in given.items() if value is not None})


@dataclass
class Trained:
    """A model ready for use.

    Attributes:
        model: in eval mode, on its device.
        name: of the model.
        classes: class names in the order of the outputs, or None where nobody knows them.
        input: what images it takes.
        data: the folder it was trained on, if known.
    """

    model: nn.Module
    name: str
    classes: list[str] | None
    input: Input
    data: str | None


def load_trained(
    file: str | None,
    *,
    name: str | None = None,
    pretrained: bool = False,
    classes: int | None = None,
    image_size: int | None = None,
    device: torch.device,
) -> Trained:
    """Return the model of a checkpoint of this library, of a foreign weight file, or of timm's pretrained weights.

    Args:
        file: checkpoint (.pt, .pth, .safetensors), or None.
        name: timm model name; a checkpoint made here knows its own.
        pretrained: take the published weights.
        classes: outputs, where the file does not say; None takes the model's own.
        image_size: pixels; None takes the checkpoint's, or the model's own.
        device: where the model goes.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the arguments contradict each other or the file holds another model's weights.
    """
    if bool(file) == pretrained:
        raise ValueError("give either --checkpoint FILE or --pretrained: there are no weights to use otherwise")
    content = checkpoint.read(file) if file else {}
    recipe = content.get("recipe", {})
    made = recipe.get("model", {})
    if made and name and name != made["name"]:
        raise ValueError(f"{file} holds a {made['name']}, not --model {name}; leave --model out")
    name = name or made.get("name")
    if not name:
        raise ValueError(f"{file} does not say which model it holds; give --model NAME")
    labels = content.get("classes")
    kwargs = dict(made.get("kwargs", {}))
    if labels or classes:
        kwargs["num_classes"] = len(labels) if labels else classes
    if pretrained:
        model = create_model(name, pretrained=True, **kwargs)
    else:
        model = create_model(name, **kwargs)
        state = checkpoint.weights(content)
        if made:
            checkpoint.load_weights(model, state, str(file))
        else:
            _load_foreign(model, state, file)
    model = model.to(device).eval()
    settings = content.get("input") or {}
    settings = settings | ({"image_size": image_size} if image_size else {})
    inputs = model_input(model, **settings)
    check_input(model, name, inputs.image_size, device)
    if labels is None and model.num_classes == 1000:
        info = ImageNetInfo()
        labels = [info.index_to_description(i) for i in range(1000)]
    return Trained(model, name, labels, inputs, recipe.get("data", {}).get("path"))


def _load_foreign(model: nn.Module, state: dict[str, torch.Tensor], file: str) -> None:
    """Load a published file, or one of another program, with its classifier."""
    try:
        fresh = models.load_checkpoint(model, state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if fresh:
        raise ValueError(
            f"{file} has no {', '.join(fresh)} for {model.num_classes} classes, so that the answers would be chance; "
            "give a file with the classifier, and its own number of classes"
        )


def choose_device(name: str | None) -> torch.device:
    """Return the device called `name`, or the first GPU where there is one and the CPU otherwise.

    Raises:
        ValueError: when the device is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device

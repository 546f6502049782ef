"""Models for the tools: made by timm, checked against the images they are to see, with weights from any source."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from timm.layers import convert_splitbn_model
from timm.models import PretrainedCfg, load_model_config_from_hf
from torch import nn

import visionmix.adaptive.recipes
import visionmix.pretraining  # noqa: F401  (they register their models)
from visionmix.backbones.contract import image_sides
from visionmix.private_api import load_model_config_from_path
from visionmix.reduction import apply
from visionmix.reduction.specs import Spec
from visionmix.registry import nearest
from visionmix.tools import checkpoint


@dataclass
class Input:
    """The images a model is tested on: side in pixels, resizing and crop, and the mean and std of normalisation."""

    image_size: int
    interpolation: str
    crop_pct: float
    mean: list[float]
    std: list[float]
    crop_mode: str = "center"

    @property
    def normalise(self) -> dict[str, tuple[float, ...]]:
        """Mean and std as timm's transforms take them."""
        return {"mean": tuple(self.mean), "std": tuple(self.std)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)


def weights_cfg(name: str) -> PretrainedCfg:
    """Return what is known of the weights called `name` before they are fetched.

    Args:
        name: timm model name, with or without a tag, or ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY`` of
            `timm.models.save_for_hf`.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: at an unknown name or tag, with the nearest ones, or at a config.json that is not timm's.
    """
    source, _, place = name.partition(":")
    if read_config := {"local-dir": load_model_config_from_path, "hf-hub": load_model_config_from_hf}.get(source):
        try:
            config, architecture, _ = read_config(place)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} has a config.json that timm did not write ({error!r})") from error
        known = weights_cfg(architecture)
        return replace(known, architecture=architecture, num_classes=config.get("num_classes", known.num_classes))
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise ValueError(
            f"model={name!r} is not known{nearest(name, timm.list_models())}; timm.list_models() lists the names"
        )
    tagged = timm.list_models(f"{arch}.*", include_tags=True)
    if tag and name not in tagged:
        raise ValueError(f"model={name!r} has an unknown tag{nearest(name, tagged)}; with tags there are {tagged}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg(architecture=arch)


def create_model(name: str, *, reduction: Spec | None = None, **kwargs: Any) -> nn.Module:
    """Return `timm.create_model(name, **kwargs)`, with its weights in it reduced as `reduction` says.

    Raises:
        FileNotFoundError: `name` is a folder without config.json.
        TypeError: the model cannot be reduced, or an option of the reduction is of another type.
        ValueError: at an unknown name or tag, with the nearest ones, at an argument that the model does not take, where
            there are no such weights, or at a reduction that cannot be read or is refused.
    """
    weights_cfg(name)
    try:
        model = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take these arguments: {error}") from error
    except RuntimeError as error:  # timm's own models say so where nobody published weights
        raise ValueError(f"model {name!r} cannot be made: {error}") from error
    return model if reduction is None else apply(model, reduction)


def split_batch_norms(model: nn.Module, splits: int, name: str) -> nn.Module:
    """Return `model` with batch norms for each of `splits` parts of a batch, as timm makes them.

    Raises:
        ValueError: it has no batch norms, or some of other shapes than timm splits.
    """
    kinds = {type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    if kinds != {nn.BatchNorm2d}:
        has = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no batch norms"
        raise ValueError(
            f"train.split_bn=True splits layers that are BatchNorm2d, and model {name!r} has {has}; set it to false"
        )
    return convert_splitbn_model(model, splits)


def check_input(model: nn.Module, name: str, image_size: int | tuple[int, int], device: torch.device) -> None:
    """Raise ValueError when the model cannot take RGB images of this size, or (height, width), before any work."""
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, *image_sides(image_size), device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model {name!r} does not take RGB images of image_size={image_size}: {error}; "
            f"choose another size, or build it for them, in a recipe with --set model.kwargs.img_size={image_size}"
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
        "crop_mode": config["crop_mode"],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    return Input(**own | {key: value for key, value in given.items() if value is not None})


def load_published(
    name: str, tensors: Mapping[str, torch.Tensor], source: str, classes: int | None = None
) -> nn.Module:
    """Return the model called `name` with the tensors of a file that its authors, timm or a user wrote.

    The keys are those of the published file or the model's own: timm's filter and the family's key map know both.

    Args:
        name: timm model name.
        tensors: the state dict, which must fit the model whole, classifier included.
        source: the file, for messages.
        classes: outputs of the file's classifier; None for the model's own number.

    Raises:
        ValueError: the tensors are not those of this model with so many classes.
    """
    overlay: dict[str, Any] = {"state_dict": dict(tensors)}
    options = {}
    if classes is not None:
        # Said to be the file's own number, or the loaders would pass over the classifier that the file has.
        options["num_classes"] = overlay["num_classes"] = classes
    try:
        model = create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, ValueError, KeyError) as error:
        lines = str(error).splitlines() or [repr(error)]
        more = f"\n  and {len(lines) - 12} more lines" if len(lines) > 12 else ""
        raise ValueError(f"{source}: " + "\n  ".join(lines[:12]) + more) from error
    model.pretrained_cfg.pop("state_dict", None)
    for layer in classifiers(model):
        wanted = layer.weight.detach()
        if not any(_holds(tensor, wanted) for tensor in tensors.values()):
            raise ValueError(
                f"{source} holds no classifier for the {model.num_classes} classes of {name}; give a file with one"
            )
    return model


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that make the logits: one, or two of a distilled model."""
    found = model.get_classifier()
    return [layer for layer in (found if isinstance(found, tuple) else (found,)) if hasattr(layer, "weight")]


def _holds(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the last rows of `tensor` are `weight`; some files have a background class before them."""
    rows = tensor.flatten(1) if tensor.ndim > 2 else tensor
    return rows.shape[1:] == weight.shape[1:] and torch.equal(rows[-len(weight) :].to(weight.dtype), weight)


@dataclass
class Outputs:
    """The outputs of a model, for those who give them images.

    Attributes:
        name: of the model.
        count: how many there are.
        labels: their labels, or None where nobody knows them.
        own: whether these are the names of the folders that the model was trained on.
    """

    name: str
    count: int
    labels: list[str] | None = None
    own: bool = False


def published_outputs(name: str, classes: int | None = None) -> Outputs:
    """Return the outputs of the published weights called `name`, which need not be fetched for that.

    Args:
        name: as `weights_cfg` takes it.
        classes: how many there must be; None for any number.

    Raises:
        FileNotFoundError: it is a folder without config.json.
        ValueError: the name is unknown, or there are more or fewer.
    """
    outputs = Outputs(name, weights_cfg(name).num_classes)
    _check_count(classes, outputs.count, name)
    return outputs


def _check_count(wanted: int | None, count: int, source: str) -> None:
    if wanted is not None and count != wanted:
        raise ValueError(
            f"--num-classes={wanted}, but the weights of {source} have {count} outputs; "
            "leave --num-classes out, or fine-tune them by visionmix train with model.pretrained=true"
        )


@dataclass
class Trained:
    """A model ready for use.

    Attributes:
        model: in eval mode, on its device.
        name: of the model.
        classes: class names in the order of the outputs, or None where nobody knows them.
        input: the images that it takes.
        recipe: by which it was trained, as `recipe.to_dict` returns it, if known.
    """

    model: nn.Module
    name: str
    classes: list[str] | None
    input: Input
    recipe: dict[str, Any] | None

    @property
    def multilabel(self) -> bool:
        """Whether its images have any number of labels."""
        return bool(self.recipe and self.recipe["data"].get("multilabel"))

    @property
    def outputs(self) -> Outputs:
        """The model's outputs and their labels."""
        own = self.recipe is not None and self.classes is not None
        return Outputs(self.name, self.model.num_classes, self.classes, own)


def load_trained(
    file: str | None,
    *,
    name: str | None = None,
    pretrained: bool = False,
    classes: int | None = None,
    image_size: int | None = None,
    device: torch.device,
) -> Trained:
    """Return the model of a checkpoint that train wrote, of any other weight file, or of the published weights.

    The classifier is always the file's: no layer keeps fresh weights.

    Args:
        file: checkpoint (.pt, .pth, .safetensors), a folder that `timm.models.save_for_hf` wrote, or None.
        name: timm model name; a checkpoint made here, or a folder, knows its own.
        pretrained: take the published weights.
        classes: outputs of the weights, for a file whose classifier has another name than the model's; None where the
            file says it, or the number is the model's own.
        image_size: pixels; None takes the checkpoint's, or the model's own.
        device: where the model goes.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the arguments contradict each other, or the file holds another model's weights or another
            number of classes.
    """
    check_one_source(bool(file), pretrained)
    folder = file is not None and (Path(file) / "config.json").is_file()
    content = checkpoint.read(file) if file and not folder else {}
    recipe = content.get("recipe", {})
    made = {"name": weights_cfg(f"local-dir:{file}").architecture} if folder else recipe.get("model", {})
    if made and name and name != made["name"]:
        raise ValueError(f"{file} holds a {made['name']}, not --model {name}; leave --model out (export: MODEL)")
    name = name or made.get("name")
    if not name:
        if runs := sorted(Path(file).glob("checkpoints/epoch_*")) if Path(file).is_dir() else []:
            raise ValueError(f"{file} is the folder of a run; give one of its checkpoints, such as {runs[-1]}")
        raise ValueError(f"{file} does not say which model it holds; give --model NAME (export: NAME alone)")
    labels = content.get("classes")
    if labels == []:
        raise ValueError(
            f"{file} was trained without labels and guesses no classes; fine-tune its backbone by visionmix train "
            "first, with model.pretrained=true and the file in model.kwargs.pretrained_cfg_overlay"
        )
    if pretrained or folder:
        source = f"local-dir:{file}" if folder else name
        expected = published_outputs(source, classes)  # refuses before anything is fetched
        model = create_model(source, pretrained=True)
        if model.num_classes != expected.count:  # timm has put a fresh classifier in the place of the file's
            raise ValueError(
                f"the weights of {source} are said to have {expected.count} outputs, and the model made for them has "
                f"{model.num_classes}, with a random classifier; make its num_classes agree everywhere in its config"
            )
    elif made:
        model = create_model(name, num_classes=len(labels), reduction=made.get("reduction"), **made.get("kwargs", {}))
        checkpoint.load_weights(model, checkpoint.weights(content), str(file))
    else:
        tensors = checkpoint.weights(content)
        model = load_published(name, tensors, str(file), _outputs(name, tensors) or classes)
    _check_count(classes, model.num_classes, file or name)
    model = model.to(device).eval()
    settings = content.get("input") or {}
    settings = settings | ({"image_size": image_size} if image_size else {})
    inputs = model_input(model, **settings)
    check_input(model, name, inputs.image_size, device)
    if labels is None and model.num_classes == 1000:
        info = ImageNetInfo()
        labels = [info.index_to_description(i) for i in range(1000)]
    return Trained(model, name, labels, inputs, recipe or None)


def _outputs(name: str, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return how many outputs the classifier in a weight file has; None where no tensor has the classifier's name."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    first = config.classifier if config else None
    first = first if isinstance(first, str | None) else first[0]  # a distilled model has two
    weight = tensors.get(f"{first}.weight") if first else None
    return len(weight) if isinstance(weight, torch.Tensor) else None


def short_hash(*parts: Any) -> str:
    """Return 12 hexadecimal digits that tell these bytes, or texts of other values, from others."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def weights_hash(model: nn.Module) -> str:
    """Return a short hash of a model's weights and their names."""
    parts: list[Any] = []
    for name, value in model.state_dict().items():
        parts += [name, value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    return short_hash(*parts)


def check_one_source(checkpoint: bool, pretrained: bool) -> None:
    """Raise ValueError unless --checkpoint or --pretrained is given, and not both."""
    if checkpoint and pretrained:
        raise ValueError("give either --checkpoint FILE or --pretrained, not both: each names weights")
    if not (checkpoint or pretrained):
        raise ValueError("give either --checkpoint FILE or --pretrained: there are no weights to use otherwise")


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
    if device.type == "meta":
        raise ValueError(f"--device {name!r} cannot be used: it holds no numbers; give cpu, cuda or cuda:1")
    return device

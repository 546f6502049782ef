"""Recipes: YAML files read into typed dataclasses by OmegaConf, with every key, type and range checked.

    base: defaults.yaml        # optional: a recipe beside this one, whose values this one overrides
    model: {name: vig_s, kwargs: {drop_path_rate: 0.2}}
    optimizer: {lr: 5.0e-4, weight_decay: 0.1}
    schedule: {epochs: 300}

A recipe is named by its path, or by its name inside the package: `imagenet/vig_s.yaml`. A value may refer to another,
as in `model: {kwargs: {img_size: "${data.image_size}"}}`; see OmegaConf's interpolations.
"""

import ast
import copy
import dataclasses
import json
import typing
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException, UnsupportedValueType

from visionmix.registry import nearest
from visionmix.tools.recipe_checks import check_values
from visionmix.tools.recipe_keys import Recipe

_SCHEMA = OmegaConf.structured(Recipe)
_SECTIONS = {section.name: typing.get_type_hints(section.type) for section in dataclasses.fields(Recipe)}
_KEYS = [f"{section}.{option}" for section, options in _SECTIONS.items() for option in options]


def from_dict(tree: dict, source: str) -> Recipe:
    """Return the recipe that a nested dictionary holds.

    Args:
        tree: sections, each a dictionary of options; an option that it lacks keeps its default.
        source: where it comes from, named in messages.

    Raises:
        ValueError: at an unknown key, with the nearest right one, or at a value out of range.
        TypeError: at a value of the wrong type.
    """
    config = OmegaConf.merge(_SCHEMA, _merge({}, tree, source))
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a reference that leads nowhere, or to a value of another type
        raise ValueError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
    check_values(recipe, source)
    return recipe


def read(name: str, overrides: dict | None = None, settings: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return the recipe called `name`, overridden by the command line.

    Args:
        name: path, or name inside the package.
        overrides: values set by flags, as a nested dictionary.
        settings: the `section.option=value` texts given to --set.

    Raises:
        FileNotFoundError: when there is no such recipe.
        ValueError: at an unknown key or a value out of range.
        TypeError: at a value of the wrong type.
    """
    return override(_read_file(find(name)), name, overrides, settings)


def override(tree: dict, source: str, overrides: dict | None, settings: list[str] | tuple[str, ...]) -> Recipe:
    """Return the recipe of `tree` with flags and --set texts laid over it; raises as `read` does."""
    tree = _merge(tree, overrides or {}, "the command line")
    for text in settings:
        given = parse_override(text)
        _check_twice(given, overrides or {}, text)
        tree = _merge(tree, given, f"--set {text}")
    return from_dict(tree, f"{source} with the command line" if overrides or settings else source)


def _check_twice(given: dict, flags: dict, text: str) -> None:
    """Refuse `given`, that of --set `text`, where a flag has another value for the same key."""
    for section, options in given.items():
        for option, value in options.items():
            flag = flags.get(section, {}).get(option, value)
            if flag != value:
                raise ValueError(
                    f"--set {text}: the command line also gives {section}.{option}={flag!r}; leave out one of the two"
                )


def find(name: str, ending: str = "yaml") -> Path:
    """Return the file of a recipe given as a path or as its name inside the package (`imagenet/vig_s.yaml`).

    Raises:
        FileNotFoundError: when there is no such recipe, with the packaged ones of this `ending`.
    """
    packaged = Path(str(resources.files("visionmix.configs")))
    for path in (Path(name), packaged / name, packaged / f"{name}.{ending}", packaged / name.removeprefix("configs/")):
        if path.is_file():
            return path
    have = sorted(str(path.relative_to(packaged)) for path in packaged.glob(f"*/*.{ending}"))
    raise FileNotFoundError(
        f"there is no recipe {name!r}, neither as a file nor in the package{nearest(name, have)}; "
        f"the package has {', '.join(have)}"
    )


def parse_override(text: str) -> dict:
    """Return `section.option=value` as a nested dictionary; the value is YAML.

    Raises:
        ValueError: when the text has another form.
    """
    key, equals, _ = text.partition("=")
    names = key.split(".")
    if not equals or len(names) < 2 or not all(name.strip() for name in names):
        raise ValueError(f"--set {text!r} has another form than section.option=value, e.g. optimizer.lr=1e-3")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"--set {text!r}: the value is not YAML: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what an error of a parser says, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"{error.problem} in line {error.problem_mark.line + 1}"


def to_dict(recipe: Recipe) -> dict:
    """Return the recipe as nested dictionaries of plain values, as a checkpoint or a YAML file holds it."""
    return dataclasses.asdict(recipe)


def differences(old: dict, new: dict) -> list[str]:
    """Return a line for each option that differs between two recipes given as dictionaries.

    An option that the old one lacks, as recipes of earlier versions do, had its default.
    """
    default = to_dict(Recipe())
    return [
        f"{section}.{key}={value!r} (was {was!r})"
        for section, options in new.items()
        for key, value in options.items()
        if (was := old.get(section, {}).get(key, default[section][key])) != value
    ]


def _read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """Return the recipe's options laid over those of its base."""
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path}: base names a recipe that is based on this one; remove one of the two")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path} is not YAML of sections: {_reason(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a recipe: it holds {type(tree).__name__}, not sections of options")
    base = tree.pop("base", None)
    if base is None:
        return _merge({}, tree, str(path))
    if not isinstance(base, str):
        raise TypeError(f"{path}: base={base!r} is {type(base).__name__}; it must be the name of a recipe beside it")
    if not (path.parent / base).is_file():
        raise FileNotFoundError(f"{path}: base={base!r} is not a file in {path.parent}")
    return _merge(_read_file(path.parent / base, (*seen, path)), tree, str(path))


def _merge(under: dict, over: dict, source: str) -> dict:
    """Return `under` overridden by `over`, option by option; dictionaries inside an option are merged too.

    Raises:
        ValueError: at an unknown key of `over`, or a value that is not one of an option's choices.
        TypeError: at a value of the wrong type.
    """
    for section, options in over.items():
        if section not in _SECTIONS:
            raise _unknown(str(section), options, "a recipe", [*_SECTIONS, "base"], source)
        if not isinstance(options, dict):
            raise TypeError(
                f"{source}: {section}={options!r} is {type(options).__name__}; it must be a section of options"
            )
        taken = copy.deepcopy(_SCHEMA[section])
        for option, value in options.items():
            key = f"{section}.{option}"
            if key not in _KEYS:
                raise _unknown(key, value, section, list(_SECTIONS[section]), source)
            try:
                OmegaConf.update(taken, option, value, merge=False)
            except (OmegaConfBaseException, TypeError) as error:
                raise _refused(error, key, value, source) from None
        for option, value in OmegaConf.to_container(taken).items():
            if option in options:
                _check_taken(options[option], value, f"{section}.{option}", source)
    return _laid_over(under, over)


def _laid_over(under: dict, over: dict) -> dict:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(under.get(key), dict)
        merged[key] = _laid_over(under[key], value) if both else copy.deepcopy(value)
    return merged


def _unknown(key: str, value: object, owner: str, known: list[str], source: str) -> ValueError:
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [name for name in _KEYS if name.endswith(f".{leaf}")]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(key, _KEYS if "." in key else known)
    return ValueError(f"{source}: {key}={value!r} is not a key of a recipe{hint}; {owner} has {', '.join(known)}")


def _refused(error: Exception, key: str, value: object, source: str) -> Exception:
    """Return the error that says what the option `key` takes in place of `value`."""
    if isinstance(error, UnsupportedValueType | KeyValidationError):  # inside a dictionary of any values
        return TypeError(f"{source}: {error.full_key}={error.value!r} is refused: {str(error).splitlines()[0]}")
    section, option = key.split(".")
    kind = _SECTIONS[section][option]
    if typing.get_origin(kind) is Literal:
        return ValueError(f"{source}: {key}={value!r} is not one of {', '.join(typing.get_args(kind))}")
    wanted = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    owner = "it"
    if isinstance(value, list | tuple) and str(error.full_key).startswith(f"{key}["):  # one of its items is refused
        owner, key, value = option, error.full_key, error.value
    return TypeError(f"{source}: {key}={value!r} is {type(value).__name__}; {owner} must be {wanted}")


def _check_taken(given: Any, taken: Any, key: str, source: str) -> None:
    """Raise at a value that OmegaConf or YAML takes for another one than was meant.

    OmegaConf makes 3 of "3", "False" of False and True of 1; YAML reads None, (1, 2) and -.5 as texts.
    """
    if isinstance(given, dict):
        for name, value in given.items():
            _check_taken(value, taken[name], f"{key}.{name}", source)
    elif isinstance(given, list | tuple):
        for number, value in enumerate(given):
            _check_taken(value, taken[number], f"{key}[{number}]", source)
    elif type(given) is not type(taken) and (type(given), type(taken)) != (int, float):
        wanted = type(taken).__name__
        raise TypeError(f"{source}: {key}={given!r} is {type(given).__name__}; it must be {wanted}")
    elif given == "???":
        raise ValueError(f"{source}: {key}='???' means no value to OmegaConf; give a value, or leave the key out")
    elif isinstance(given, str):
        try:
            meant = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return
        if not isinstance(meant, str) and isinstance(OmegaConf.from_dotlist([f"value={given}"]).value, str):
            written = "null" if meant is None else json.dumps(meant)
            raise ValueError(f"{source}: {key}={given!r} is a text in YAML; write {written}, without quotes")

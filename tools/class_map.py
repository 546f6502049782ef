"""The output of a model that each class folder stands for, by the model's own labels, by ImageNet's, or by a class map.

A class map is a text file with a line `FOLDER OUTPUT` for each folder, split at a tab or else at the first space, or it
is JSON, `{"FOLDER": OUTPUT, ...}`. An output is an index, an ImageNet synset (n01440764), or a label of the model. A
text file of folder names alone, as timm takes it, numbers the outputs by line from 0; of a model that has more outputs,
and knows these names, it is refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from visionmix.tools.arguments import absent
from visionmix.tools.models import Outputs


def read_class_map(file: Path) -> dict[str, str]:
    """Return the output of each folder in a class map, as it is written there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither such a text nor such JSON, or names a folder twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"class map {file} {absent(file)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith(("{", "[")):
            pairs = json.loads(text, object_pairs_hook=list)
            if not all(isinstance(pair, tuple) and type(pair[1]) in (int, str) for pair in pairs):
                raise ValueError("it holds something other than an index or a label")
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            pairs = [tuple(re.split(r"\s*\t\s*" if "\t" in line else r"\s+", line, maxsplit=1)) for line in lines]
            if all(len(pair) == 1 for pair in pairs):
                pairs = [(folder, number) for number, (folder,) in enumerate(pairs)]
            if short := [pair[0] for pair in pairs if len(pair) == 1]:
                raise ValueError(f"{short[0]!r} has no output")
    except ValueError as error:
        raise ValueError(f'{file} is not a class map ({error}); write lines "FOLDER OUTPUT" or JSON') from error
    outputs = {folder: str(output).strip() for folder, output in pairs}
    if len(outputs) < len(pairs):
        names = [folder for folder, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file} names the folder {twice!r} twice; leave one of the lines out")
    return outputs


def _labels(outputs: Outputs) -> dict[str, list[int]]:
    """Return the outputs by label: the model's own labels, or ImageNet's synsets and lemmas in lower case."""
    found: dict[str, list[int]] = {}
    if outputs.own:
        names = [{label} for label in outputs.labels or []]
    elif subset := infer_imagenet_subset({"num_classes": outputs.count}):
        info = ImageNetInfo(subset)
        described = [(synset, info.label_name_to_description(synset).lower()) for synset in info.label_names()]
        names = [{synset, lemmas, *lemmas.split(", ")} for synset, lemmas in described]
    else:
        names = [{label.lower()} for label in outputs.labels or []]
    for output, labels in enumerate(names):
        for label in labels:
            found.setdefault(label, []).append(output)
    return found


def _output(written: str, labels: Mapping[str, list[int]], count: int) -> int:
    """Return the output that an entry of a class map stands for; raise ValueError if there is none or several."""
    if written.isdecimal() and written.isascii():
        if int(written) >= count:
            raise ValueError(f"output {written} is outside [0, {count - 1}]")
        return int(written)
    outputs = labels.get(written) or labels.get(written.lower(), [])
    if len(outputs) != 1:
        several = f"{len(outputs)} outputs have the label {written!r}: {', '.join(map(str, outputs))}"
        raise ValueError(several if outputs else f"no output has the label {written!r}")
    return outputs[0]


def find_outputs(
    folders: Sequence[str], outputs: Outputs, where: Path | str, class_map: Mapping[str, str] | None = None
) -> list[int]:
    """Return the model's output for each of `folders`.

    Without a class map, folders named by the model's own labels or by ImageNet synsets stand for these. Other folders
    are refused, as many as there may be: which output each stands for would be a guess.

    Args:
        folders: names of the class folders, sorted.
        outputs: what the model's outputs stand for.
        where: the folder or shards that hold them, for messages.
        class_map: as `read_class_map` returns it.

    Raises:
        ValueError: the model tells no classes apart, or a folder is missing in the class map or stands for no output.
    """
    name, count = outputs.name, outputs.count
    if count < 2:
        raise ValueError(f"{name} has num_classes={count} and tells no classes apart; give a classifier")
    labels = _labels(outputs)
    if class_map is not None:
        if missing := [folder for folder in folders if folder not in class_map]:
            raise ValueError(f"--class-map lacks {len(missing)} folder(s) of {where}: {', '.join(missing[:5])}")
        numbered = list(class_map.values()) == [str(place) for place in range(len(class_map))]
        if numbered and len(class_map) < count:  # names alone, which number the outputs of a model of so many classes
            named = [folder for folder, place in class_map.items() if labels.get(folder, [int(place)]) != [int(place)]]
            if named:
                raise ValueError(
                    f"--class-map numbers {len(class_map)} folders from 0, so that {named[0]} is output "
                    f"{class_map[named[0]]}, where {name} has it as output {labels[named[0]][0]} of {count}; "
                    f'write lines "{named[0]} {named[0]}"'
                )
        try:
            return [_output(class_map[folder], labels, count) for folder in folders]
        except ValueError as error:
            raise ValueError(f"--class-map: {error}; {name} has {count} outputs") from error
    numbers = f"{where} has {len(folders)} classes, the weights of {name} have {count} outputs"
    named = [folder for folder in folders if folder in labels and (outputs.own or re.fullmatch(r"n\d{8}", folder))]
    if len(named) == len(folders):
        return [labels[folder][0] for folder in folders]
    if outputs.own or named:
        other = [folder for folder in folders if folder not in named]
        raise ValueError(
            f"{numbers}, and the model was trained on other classes than {', '.join(other[:5])}; "
            "rename the folders, or say by --class-map FILE which output each stands for"
        )
    hint = f"; `LC_ALL=C ls {where} > FILE` says that they do so in sorted order" if len(folders) == count else ""
    raise ValueError(
        f"{numbers}, and no folder has the name of a label; name the folders by ImageNet synset where these are its "
        f"classes, or say by --class-map FILE which output each stands for{hint}"
    )


def all_outputs(outputs: Outputs, class_map: Mapping[str, str]) -> list[int]:
    """Return the distinct outputs that a class map names, for folders that are there or not, in ascending order.

    Raises:
        ValueError: an entry stands for no output.
    """
    return sorted(set(find_outputs(list(class_map), outputs, Path(), class_map)))


def synset_outputs(outputs: Outputs) -> list[int] | None:
    """Return the model's output for each class of ImageNet-1k; None where it has not all of them."""
    labels = _labels(outputs)
    found = [labels.get(synset, []) for synset in ImageNetInfo().label_names()]
    return [places[0] for places in found] if all(found) else None

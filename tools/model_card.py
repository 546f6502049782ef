"""The model card of converted weights: licence, source, citation, and how they are loaded."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from torch import nn

from visionmix.models import Published, Weights
from visionmix.models.family import family_of

UNKNOWN = "unknown"
# Licences, as the hub spells them, that let anyone pass weights on who keeps licence and notice.
FREE = frozenset({"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0"})
_CONDITIONAL = frozenset({UNKNOWN, "agpl-3.0", "gpl-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"})

_CARD = """---
{}
---

# {}

{}

{}

## Use

```python
import timm, visionmix

model = timm.create_model("hf-hub:USER/REPOSITORY", pretrained=True).eval()
```

## Citation

```bibtex
{}
```
"""


@dataclass(frozen=True)
class Origin:
    """Where converted weights come from.

    Attributes:
        name: of the model, as the user gave it.
        licence: that the folder carries.
        by_authors: whether the authors state it, and not the one who converted.
        facts: as published.
        weights: where they lie.
        file: name of the file that was converted.
        sha256: its checksum.
    """

    name: str
    licence: str
    by_authors: bool
    facts: Published
    weights: Weights
    file: str
    sha256: str


def citation(paper: str) -> str:
    """Return BibTeX entries of the arXiv numbers in `paper`, or `paper` itself where it has none."""
    entry = "@misc{{arxiv_{0},\n  eprint = {{{0}}},\n  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{0}}}\n}}"
    return "\n".join(entry.format(number) for number in re.findall(r"\d{4}\.\d{4,5}", paper)) or paper


def _terms(origin: Origin) -> str:
    if origin.licence == UNKNOWN:
        return "The authors state no licence: this folder is for the use of the one who made it, not to be passed on."
    if not origin.by_authors:
        return f"{origin.licence}, as the one who converted the weights states; the authors state none in public."
    return f"{origin.licence}, that of the authors."


def write_card(path: Path, model: nn.Module, origin: Origin) -> None:
    """Write the card of `model` as Markdown with the hub's header."""
    known = origin.licence in FREE | _CONDITIONAL
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    header = ModelCardData(
        license=origin.licence if known else "other",
        license_name=None if known else origin.licence,
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "visionmix"],
    )
    cfg, facts = model.pretrained_cfg, origin.facts
    about = (sys.modules[family_of(origin.name).module].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    rows = {
        "Licence of the weights": _terms(origin),
        "Source": f"{origin.weights.address or 'not recorded'}, file {origin.file}, SHA-256 {origin.sha256}",
        "Changes": "keys and layout of the tensors, by visionmix's key map of the family; nothing was trained",
        "Paper": facts.paper,
        "Parameters": f"{sum(value.numel() for value in model.parameters()) / 1e6:.1f} M",
        "Images": f"{cfg['input_size'][1]}x{cfg['input_size'][2]}, mean {cfg['mean']}, deviation {cfg['std']}",
        "ImageNet-1k top-1": f"{facts.top1} %, as published" if facts.top1 else "none published",
    }
    table = "\n".join(f"- **{name}:** {text}" for name, text in rows.items())
    path.write_text(_CARD.format(header.to_yaml(), origin.name, about, table, citation(facts.paper)), encoding="utf-8")

"""Convert a published checkpoint into a folder that timm reads: safetensors, config.json and a model card.

visionmix convert vmamba_tiny.pth vmamba_tiny folders/vmamba_tiny
visionmix convert mambavision_base.pth.tar mambavision_base OUT --accept-licence cc-by-nc-sa-4.0
python -c 'import timm, visionmix; timm.create_model("local-dir:folders/vmamba_tiny", pretrained=True)'

Every key of the file and every parameter of the model must be accounted for, as always. The folder is then loaded by
timm, and comes to OUT only if its model gives the very logits of the file's.

Such folders are made to be passed on, so the licence of the weights decides:

- Licences that let anyone pass weights on who keeps licence and notice (Apache-2.0, MIT, BSD, CC0, CC BY): converted
  as they are. Add the authors' licence by --licence-file: most of them ask that its text goes along.
- Licences that let you pass weights on under conditions (AGPL-3.0, CC BY-NC-SA-4.0 and any other): converted if you
  name the licence by --accept-licence, which says that you have read it and will keep its conditions.
- Where the authors state no licence, nobody but them may pass the weights on. --accept-licence unknown makes a folder
  for your own use, and its card says so. If the authors gave you a licence, name it: the card says that you state it.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from visionmix.models import Published, list_family_models, published
from visionmix.models.family import weights_of
from visionmix.registry import nearest
from visionmix.tools import checkpoint, models
from visionmix.tools.arguments import absent, check_out
from visionmix.tools.model_card import FREE, UNKNOWN, Origin, citation, write_card


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("file", type=Path, help="the checkpoint, as its authors published it")
    parse.add_argument("model", help="name of the model, with the tag of the weights where there are several")
    parse.add_argument("out", type=Path, help="folder that is made")
    parse.add_argument("--accept-licence", metavar="NAME", help="see above")
    parse.add_argument("--licence-file", type=Path, metavar="FILE", help="copied to OUT/LICENSE")
    return parse


def settle_licence(facts: Published, accepted: str | None, name: str) -> str:
    """Return the licence that the folder carries.

    Args:
        facts: those of the weights.
        accepted: the licence that the user names, or None.
        name: of the model, for messages.

    Raises:
        ValueError: the weights may not be passed on without more ado and `accepted` does not name their licence.
    """
    own = facts.license
    if own == UNKNOWN:
        if not accepted:
            raise ValueError(
                f"the authors of {name} state no licence for its weights, so that nobody else may pass them on; "
                "--accept-licence unknown converts them for your own use, --accept-licence NAME if you were given one"
            )
        return accepted.lower()
    if accepted and accepted.lower() != own:
        raise ValueError(f"--accept-licence={accepted} is not the licence of {name}, which is {own}")
    if own not in FREE and not accepted:
        raise ValueError(
            f"the weights of {name} are under {own}, which sets conditions to those who pass them on; read it, and "
            f"say --accept-licence {own}"
        )
    return own


def load_file(file: Path, name: str) -> nn.Module:
    """Return the model called `name`, in eval mode, with the weights of a published file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, another model's, or a checkpoint of `visionmix train`.
    """
    content = checkpoint.read(file)
    if "recipe" in content:
        raise ValueError(
            f"{file} was trained here and is no published file, so that no licence or paper is known of it; write its "
            "folder by timm.models.save_for_hf"
        )
    return models.load_published(name, checkpoint.weights(content), str(file)).eval()


def check_folder(folder: Path, model: nn.Module) -> None:
    """Raise ValueError unless timm makes of `folder` a model that gives the logits of `model`, to the bit."""
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.equal(again(images), model(images)):
            raise ValueError(f"timm {timm.__version__} makes another model of the folder; nothing was written")


def convert(file: Path, name: str, out: Path, *, accepted: str | None = None, licence_file: Path | None = None) -> None:
    """Write the folder `out`; see this module's docstring.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: `out` is there and not empty.
        ValueError: the name is unknown, the licence does not allow it, or the file holds another model's weights.
    """
    if name.partition(".")[0] not in list_family_models():
        raise ValueError(f"model={name!r} is not a model of visionmix{nearest(name, list_family_models())}")
    facts, weights = published(name), weights_of(name)
    licence = settle_licence(facts, accepted, name)
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} is there already; remove it, or name another folder")
    check_out(out / "config.json", name="OUT")
    if licence_file is not None and not licence_file.is_file():
        raise FileNotFoundError(f"--licence-file={licence_file} {absent(licence_file)}")
    model = load_file(file, name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    if weights.sha256 and digest != weights.sha256:
        raise ValueError(f"{file} is not the file that the authors of {name} published: its SHA-256 is {digest}")
    origin = Origin(name, licence, facts.license == licence, facts, weights, file.name, digest)
    about = {
        "pretrained_cfg": {
            "license": licence,
            "paper_ids": re.findall(r"\d{4}\.\d{4,5}", facts.paper),
            "origin_url": weights.address or None,
        },
        "license": licence,
        "citation": citation(facts.paper),
        "source": {"address": weights.address, "file": file.name, "sha256": digest},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        aside = Path(temporary, out.name)
        save_for_hf(model, aside, model_config=about, safe_serialization=True)
        shutil.copymode(aside / "config.json", aside / "model.safetensors")  # which its owner alone could read
        write_card(aside / "README.md", model, origin)
        if licence_file is not None:
            shutil.copyfile(licence_file, aside / "LICENSE")
        check_folder(aside, model)
        for written in aside.iterdir():
            with written.open("rb+") as opened:
                os.fsync(opened.fileno())
        aside.replace(out)


def main(argv: list[str] | None = None) -> int:
    """Run the `convert` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        convert(args.file, args.model, args.out, accepted=args.accept_licence, licence_file=args.licence_file)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: timm.create_model('local-dir:{args.out}', pretrained=True) after import visionmix")
    return 0


if __name__ == "__main__":
    sys.exit(main())

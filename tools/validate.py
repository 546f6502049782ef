"""Test models on an image folder or shards: top-1, top-5, images a second, beside the published top-1.

python tools/validate.py --checkpoint output/vig_photos/best.safetensors   # knows its model, images and data
visionmix validate --model vig_s vig_b --pretrained --data /data/imagenet --csv results.csv
visionmix validate --checkpoint output/*/best.safetensors --data /data/imagenet --csv results.csv
visionmix validate --model vig_s --checkpoint weights.pth --data /data/imagenet --real-labels real.json
visionmix validate --model vig_s --pretrained --data /data/imagenet-a --class-map imagenet_a.txt --only-mapped
visionmix validate --model vig_s --pretrained --data "https://host/in1k/val-{000000..000006}.tar"
torchrun --nproc-per-node 8 tools/validate.py --pretrained --model @names.txt --data /data/imagenet

@FILE stands for the lines of a text file, in place of one or more arguments.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visionmix.models import published
from visionmix.tools import checkpoint, data, models, processes, shards
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.class_map import all_outputs, find_outputs, read_class_map, synset_outputs
from visionmix.tools.display import Display
from visionmix.tools.evaluation import AMP_DTYPES, Evaluation, evaluate
from visionmix.tools.manifests import has_manifests
from visionmix.tools.real_labels import RealLabels, read_real_labels
from visionmix.tools.recipe import from_dict
from visionmix.tools.recipe_keys import DataRecipe
from visionmix.tools.rows import append_rows, has_row, read_rows

_NO_DATA = "--data is missing: give a folder of class folders, or shards"
COLUMNS = (
    "model", "checkpoint", "data", "class_map", "real_labels", "classes", "outputs", "images", "unreadable",
    "image_size", "amp", "top1", "top5", "map", "published_top1", "difference", "loss", "images_per_second",
    "weights_hash", "images_hash",
)  # fmt: skip
# Columns in which a row must agree to stand for a test that is asked for.
KEY = ("model", "checkpoint", "data", "outputs", "image_size", "amp", "weights_hash", "images_hash")


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parse.convert_arg_line_to_args = lambda line: [line.strip()] if line.strip() else []
    parse.add_argument(
        "--model", nargs="+", help="timm model names; a checkpoint of train.py, or a folder, knows its own"
    )
    parse.add_argument(
        "--checkpoint", nargs="+", help="weights: .pt, .pth, .safetensors, or folders of timm's save_for_hf"
    )
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument(
        "--data",
        help="folder with val/CLASS/*, with val.csv, or with the class folders themselves; or WebDataset shards: a "
        "folder, or a pattern of files or URLs",
    )
    parse.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help='which output each class folder stands for: lines "FOLDER OUTPUT" or JSON, an output being an index, '
        "a label of the model or an ImageNet synset (default: the folders' names say it)",
    )
    parse.add_argument(
        "--only-mapped",
        action="store_true",
        help="let the model choose among the outputs in the class map alone, as the authors of ImageNet-A and -R do",
    )
    parse.add_argument(
        "--real-labels",
        type=Path,
        metavar="FILE",
        help="real.json of 'Are we done with ImageNet?': all right classes of each validation image",
    )
    parse.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    parse.add_argument("--workers", type=int, default=2, help="data-loading processes (default: %(default)s)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels")
    parse.add_argument("--amp", choices=("none", *AMP_DTYPES), default="none", help="mixed precision")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parse.add_argument(
        "--csv", type=Path, metavar="FILE", help="add a row for each test; those that it has are not made again"
    )
    return parse


def test_folder(root: Path) -> Path:
    """Return ROOT/val (validation, test) where there is one, and ROOT itself where it holds the class folders."""
    names = data.SPLITS["val"]
    if root.is_dir() and not any((root / name).is_dir() for name in (*names, *data.SPLITS["train"])):
        return root
    return data.split_folder(root, "val")


def test_data(path: str, class_map: Mapping[str, str] | None) -> DataRecipe:
    """Return the images to test, as a recipe has them: `test_folder`, or the shards of a folder or pattern.

    Of a pattern, those of val, or all where no name says of which split it is.

    Raises:
        OSError: something is missing, or cannot be fetched.
        ValueError: shards do not have an index and there is no class map.
    """
    if not shards.has_shards(path):
        return DataRecipe(path=str(test_folder(Path(path))), val=".")
    wanted = DataRecipe(path=data.absolute(path))
    if not Path(path).is_dir():
        names = shards.expand(wanted.path)
        if not any(shards.is_of_split(name, split) for name in names for split in data.SPLITS):
            wanted.val = wanted.path
    if not (shards.find_split(wanted.path, "val", wanted.val)[0].parent / shards.INDEX).is_file():
        if class_map is None:
            raise ValueError(
                f"{path} has no {shards.INDEX}, which names the classes of its shards; say by --class-map FILE which "
                'output each number stands for, in lines "NUMBER OUTPUT"'
            )
        wanted.classes = len(class_map)
    return wanted


def pair(names: list[str] | None, files: list[str] | None, pretrained: bool) -> list[tuple[str | None, str | None]]:
    """Return (model name, checkpoint) of each test.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: the arguments contradict each other.
    """
    models.check_one_source(bool(files), pretrained)
    if not files:
        if not names:
            raise ValueError("--pretrained does not say which model; give --model NAME")
        return [(name, None) for name in names]
    if missing := [file for file in files if not Path(file).exists()]:
        raise FileNotFoundError(f"checkpoint {missing[0]} does not exist")
    if names and len(names) not in (1, len(files)):
        raise ValueError(
            f"--model has {len(names)} names and --checkpoint {len(files)} files; give one name for all, or one each"
        )
    return list(zip(names * (len(files) // len(names)) if names else [None] * len(files), files, strict=True))


def published_top1(trained: models.Trained) -> float | None:
    """Return the published ImageNet-1k top-1 of a model that has ImageNet's classes; None where nobody says it."""
    try:
        figure = published(trained.name).top1
    except ValueError:  # not of this library
        return None
    return figure if synset_outputs(trained.outputs) else None


def _images(dataset: data.ImageSet) -> Any:
    """Return what tells the images of a test from others in the same place."""
    if isinstance(dataset, shards.ShardSet):
        return dataset.files, dataset.sizes.tolist(), dataset.targets.tolist()
    return getattr(dataset, "samples", len(dataset))


class Tests:
    """The tests that a command line asks for.

    Args:
        args: of `parser`.
        device: where models go.
        rank: of this process.
        world: number of processes, each of which tests its share of the images.

    Raises:
        ValueError: the arguments contradict each other, or published weights are of other classes than the data.
        OSError: a file cannot be read.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.args, self.device, self.rank, self.world = args, device, rank, world
        self.jobs = pair(args.model, args.checkpoint, args.pretrained)
        if args.json and len(self.jobs) > 1:
            raise ValueError(f"--json takes one result, and these are {len(self.jobs)}; give --csv FILE")
        if args.only_mapped and not args.class_map:
            raise ValueError("--only-mapped needs --class-map FILE, which says the outputs to choose among")
        if args.real_labels and args.class_map:
            raise ValueError("--real-labels says the classes of each image; leave --class-map out")
        self.class_map = read_class_map(args.class_map) if args.class_map else None
        if args.real_labels and args.data and shards.has_shards(args.data):
            raise ValueError(f"--real-labels goes by the names of images in a folder, not by shards as {args.data}")
        # Of images in CSV files, the model's own recipe says the rest.
        self.given = test_data(args.data, self.class_map) if args.data and not has_manifests(Path(args.data)) else None
        self.classes = data.split_classes(self.given, "val") if self.given else None
        self.real = read_real_labels(args.real_labels) if args.real_labels else None
        for name, file in {"--csv": args.csv, "--json": args.json}.items():
            if file:
                check_out(file, name=name)
        self.rows = read_rows(args.csv, COLUMNS) if args.csv else []
        if args.pretrained:  # before anything is fetched
            if self.given is None:
                raise ValueError(_NO_DATA)
            for name, _ in self.jobs:
                self.targets(models.published_outputs(name))

    def targets(self, outputs: models.Outputs) -> tuple[list[int] | None, Any]:
        """Return (output of each class of --data, Real labels), one of which is None.

        Raises:
            ValueError: the model's outputs do not stand for these classes, or nothing says how.
        """
        if self.real is None:
            return find_outputs(self.classes, outputs, self.given.path, self.class_map), None
        return None, RealLabels(self.real, outputs)

    def run(self, name: str | None, file: str | None) -> dict[str, Any] | None:
        """Make a test and return its row; None where the CSV file has it.

        Raises:
            ValueError: the file holds no weights of this model, or the images are of other classes, or unreadable.
            OSError: a file cannot be read.
        """
        args = self.args
        trained = models.load_trained(
            file, name=name, pretrained=args.pretrained, image_size=args.img_size, device=self.device
        )
        settings = trained.input
        transform = data.eval_transform(
            settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise, settings.crop_mode
        )
        if self.given and trained.multilabel:
            raise ValueError(f"{file} was trained on images of several labels; give --data a folder with val.csv")
        if self.given:
            place = self.given.path
            outputs, real = self.targets(trained.outputs)
            dataset = data.open_split(self.given, "val", self.classes, transform, outputs=outputs)
        else:  # the data that it was trained on, of whatever kind
            if trained.recipe is None or args.class_map or args.real_labels:
                raise ValueError(_NO_DATA)
            wanted = from_dict(trained.recipe, str(file)).data
            if args.data:
                wanted = replace(wanted, path=args.data, val=None)
            place, outputs, real = str(wanted.path), list(range(len(trained.classes))), None
            dataset = data.open_split(wanted, "val", trained.classes, transform)
        adapt, among = None, list(range(trained.model.num_classes))
        if real:
            dataset.samples = real.samples(dataset.samples)
            adapt = real.adapt
        elif args.only_mapped:
            among = all_outputs(trained.outputs, self.class_map)
            others = torch.ones(trained.model.num_classes, dtype=torch.bool, device=self.device)
            others[among] = False

            def adapt(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return logits.masked_fill(others, -torch.inf), target

        row = {
            "model": trained.name,
            "checkpoint": file or "pretrained",
            "data": place,
            "class_map": args.class_map or "",
            "real_labels": args.real_labels or "",
            "classes": len(real.outputs if real else set(outputs)),
            "outputs": len(among),
            "image_size": settings.image_size,
            "amp": args.amp,
            "weights_hash": models.weights_hash(trained.model),
            "images_hash": models.short_hash(_images(dataset), real.sets if real else among, settings),
        }
        if has_row(self.rows, row, KEY):
            return None
        loader = data.make_loader(
            dataset, batch=args.batch_size, workers=args.workers, shuffle=False, rank=self.rank, world=self.world
        )
        with Display(1, len(loader), quiet=self.rank > 0) as display:
            display.begin(1, "test", len(loader))
            result = evaluate(
                trained.model,
                loader,
                classes=trained.model.num_classes,
                device=self.device,
                amp=args.amp,
                after_batch=display.step,
                adapt=adapt,
                multilabel=trained.multilabel,
            )
        figure = published_top1(trained)
        row |= {
            "images": result.count,
            "unreadable": len(result.unreadable),
            **dict.fromkeys(("top1", "top5", "map"), ""),
            **result.figures,
            "published_top1": "" if figure is None else figure,
            "difference": "" if figure is None else round(result.top1 - figure, 2),
            "loss": result.loss,
            "images_per_second": result.images_per_second,
        }
        if not self.rank:
            self.report(row, result)
        return {column: row[column] for column in COLUMNS}

    def report(self, row: dict[str, Any], result: Evaluation) -> None:
        """Print a row, and the images that it leaves out."""
        beside = ""
        if row["published_top1"] != "":
            beside = f", published {row['published_top1']} % ({row['difference']:+.2f})"
        first, *others = result.text.split(", ")
        print(
            f"{row['model']} on {row['data']}: {', '.join([first + beside, *others])} of "
            f"{row['images']} images in {row['classes']} of the model's {row['outputs']} classes, "
            f"{row['images_per_second']:.0f} images/s"
        )
        for line in result.unreadable:
            print(f"  cannot be read, left out: {line}")


def main(argv: list[str] | None = None) -> int:
    """Run the `validate` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        check_least(1, batch_size=args.batch_size, img_size=args.img_size)
        check_least(0, workers=args.workers)
        tests = Tests(args, *processes.join(args.device))
        return max([_test(tests, name, file) for name, file in tests.jobs])
    except (ValueError, OSError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    finally:
        processes.leave()


def _test(tests: Tests, name: str | None, file: str | None) -> int:
    """Make and write one of the tests; return its exit status, so that a failure leaves the others their turn."""
    args = tests.args
    try:
        row = tests.run(name, file)
    except data.UnreadableData as error:
        print(f"validate: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    if tests.rank:
        return 0
    if row is None:
        print(f"{file or name}: {args.csv} has this test")
        return 0
    try:
        if args.json:
            text = json.dumps(row, indent=1, default=str) + "\n"
            checkpoint.write_aside(args.json, lambda aside: aside.write_text(text))
        if args.csv:
            append_rows(args.csv, [row], COLUMNS)
    except (ValueError, OSError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

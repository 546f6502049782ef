"""Test a model on an image folder: top-1, top-5, images a second.

python tools/validate.py --checkpoint output/vig_photos/best.safetensors        # knows its model, images and data
visionmix validate --model vig_s --pretrained --data /data/imagenet
visionmix validate --model vig_s --checkpoint weights.pth --data /data/imagenet --json result.json
visionmix validate --model vig_s --pretrained --data /data/hundred_classes --class-map classes.txt
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

from visionmix.tools import checkpoint, data, models
from visionmix.tools.arguments import check_least
from visionmix.tools.class_map import find_outputs, read_class_map
from visionmix.tools.display import Display
from visionmix.tools.evaluation import AMP_DTYPES, evaluate

_NO_DATA = "--data is missing: give a folder of class folders"


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--model", help="timm model name; a checkpoint of train.py, or a folder, knows its own")
    parse.add_argument("--checkpoint", help="weights: .pt, .pth, .safetensors, or a folder of timm's save_for_hf")
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument("--data", help="folder with val/CLASS/*, or with the class folders themselves")
    parse.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help='which output each class folder stands for: lines "FOLDER OUTPUT" or JSON, an output being an index, '
        "a label of the model or an ImageNet synset (default: the folders' names say it)",
    )
    parse.add_argument("--batch-size", type=int, default=128, help="images a step (default: %(default)s)")
    parse.add_argument("--workers", type=int, default=2, help="data-loading processes (default: %(default)s)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels")
    parse.add_argument("--amp", choices=("none", *AMP_DTYPES), default="none", help="mixed precision")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parse.add_argument("--csv", type=Path, metavar="FILE", help="write the result as a CSV row")
    return parse


def test_folder(root: Path) -> Path:
    """Return ROOT/val (validation, test) where there is one, and ROOT itself where it holds the class folders."""
    names = data.SPLITS["val"]
    if root.is_dir() and not any((root / name).is_dir() for name in (*names, *data.SPLITS["train"])):
        return root
    return data.split_folder(root, "val")


def main(argv: list[str] | None = None) -> int:
    """Run the `validate` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        check_least(1, batch_size=args.batch_size, img_size=args.img_size)
        check_least(0, workers=args.workers)
        folder = test_folder(Path(args.data)) if args.data else None
        classes = data.find_classes(folder) if folder else None
        class_map = read_class_map(args.class_map) if args.class_map else None
        device = models.choose_device(args.device)
        outputs = None
        if args.pretrained and args.model:  # before anything is fetched
            if folder is None:
                raise ValueError(_NO_DATA)
            outputs = find_outputs(classes, models.published_outputs(args.model), folder, class_map)
        trained = models.load_trained(
            args.checkpoint, name=args.model, pretrained=args.pretrained, image_size=args.img_size, device=device
        )
        if folder is None:
            if trained.data is None:
                raise ValueError(_NO_DATA)
            folder = test_folder(Path(trained.data))
            classes = data.find_classes(folder)
        if outputs is None:
            outputs = find_outputs(classes, trained.outputs, folder, class_map)
    except (ValueError, OSError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    settings = trained.input
    transform = data.eval_transform(settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise)
    dataset = data.FolderSet(folder, classes, transform, seed=0, replace=False, outputs=outputs)
    loader = data.make_loader(dataset, batch=args.batch_size, workers=args.workers, shuffle=False)
    try:
        with Display(1, len(loader)) as display:
            display.begin(1, "test", len(loader))
            result = evaluate(
                trained.model,
                loader,
                classes=trained.model.num_classes,
                device=device,
                amp=args.amp,
                after_batch=display.step,
            )
        row = {
            "model": trained.name,
            "checkpoint": args.checkpoint or "pretrained",
            "data": str(folder),
            "classes": len(set(outputs)),
            "outputs": trained.model.num_classes,
            "images": result.count,
            "unreadable": len(result.unreadable),
            "image_size": settings.image_size,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "images_per_second": result.images_per_second,
        }
        print(
            f"{trained.name} on {folder}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % of {result.count} "
            f"images in {row['classes']} of the model's {row['outputs']} classes, "
            f"{result.images_per_second:.0f} images/s"
        )
        for line in result.unreadable:
            print(f"  cannot be read, left out: {line}")
        if args.json:
            checkpoint.write_aside(args.json, lambda aside: aside.write_text(json.dumps(row, indent=1) + "\n"))
        if args.csv:
            text = io.StringIO()
            table = csv.DictWriter(text, row)
            table.writeheader()
            table.writerow(row)
            checkpoint.write_aside(args.csv, lambda aside: aside.write_text(text.getvalue()))
    except (OSError, data.UnreadableData) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

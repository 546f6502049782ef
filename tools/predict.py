"""Classify images: the k most likely classes of each, with their probabilities.

python tools/predict.py cat.jpg holidays/ --checkpoint output/vig_photos/best.safetensors
visionmix predict cat.jpg --model vig_s --pretrained --topk 3 --csv guesses.csv
"""

import argparse
import csv
import io
import sys
from pathlib import Path

import torch
from rich.table import Table

from visionmix.tools import checkpoint, data, display, models
from visionmix.tools.arguments import check_least
from visionmix.tools.images import UnreadableImage, find_files, is_image, log_left_out, read_rgb


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    parse.add_argument("--model", help="timm model name; a checkpoint of train.py, or a folder, knows its own")
    parse.add_argument("--checkpoint", help="weights: .pt, .pth, .safetensors, or a folder of timm's save_for_hf")
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument(
        "--num-classes", type=int, help="outputs that the weights must have; any other number is refused"
    )
    parse.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parse.add_argument("--batch-size", type=int, default=32, help="images a step (default: %(default)s)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parse.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each image and class")
    return parse


def find_images(paths: list[Path]) -> list[Path]:
    """Return the files given, and all images at any depth in the folders given, in sorted order.

    Hidden files are passed over; other files of a folder are left out and logged.

    Raises:
        FileNotFoundError: a path does not exist or a folder holds no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(find_files(path))
            readable = [file for file in inside if is_image(file)]
            if not readable:
                raise FileNotFoundError(f"{path} holds no images that Pillow decodes, only {len(inside)} other file(s)")
            log_left_out(path, [file for file in inside if not is_image(file)])
            found += readable
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path} does not exist")
    return found


@torch.inference_mode()
def predict(
    trained: models.Trained, files: list[Path], topk: int, batch: int, device: torch.device
) -> tuple[list[tuple[Path, list[tuple[str, float]]]], list[str]]:
    """Return the guesses for each image, and a line for each file that cannot be read, with its path and the reason.

    The guesses for an image are (file, [(class, probability), ...]) from the likeliest class down.
    """
    settings = trained.input
    transform = data.eval_transform(settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise)
    names = trained.classes or [str(i) for i in range(trained.model.num_classes)]
    rows, unreadable = [], []
    for start in range(0, len(files), batch):
        readable, images = [], []
        for file in files[start : start + batch]:
            try:
                images.append(transform(read_rgb(file)))
                readable.append(file)
            except UnreadableImage as error:
                unreadable.append(str(error))
        if not images:
            continue
        logits = trained.model(torch.stack(images).to(device)).float()
        probabilities, guesses = logits.softmax(1).topk(min(topk, len(names)), dim=1)
        for file, values, indices in zip(readable, probabilities.tolist(), guesses.tolist(), strict=True):
            rows.append((file, [(names[i], value) for i, value in zip(indices, values, strict=True)]))
    return rows, unreadable


def main(argv: list[str] | None = None) -> int:
    """Run the `predict` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        check_least(1, topk=args.topk, batch_size=args.batch_size, img_size=args.img_size, num_classes=args.num_classes)
        files = find_images(args.images)
        device = models.choose_device(args.device)
        trained = models.load_trained(
            args.checkpoint,
            name=args.model,
            pretrained=args.pretrained,
            classes=args.num_classes,
            image_size=args.img_size,
            device=device,
        )
    except (ValueError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    rows, unreadable = predict(trained, files, args.topk, args.batch_size, device)
    table = Table("image", "class", "probability", box=None, header_style="bold")
    for file, guesses in rows:
        for place, (name, probability) in enumerate(guesses):
            style = "bold" if place == 0 else "dim"
            table.add_row("" if place else str(file), name, f"{100 * probability:.1f} %", style=style)
    console = display.table_console()
    console.print(table)
    for line in unreadable:
        print(f"predict: left out, cannot be read: {line}", file=sys.stderr)
    if args.csv:
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(("image", "rank", "class", "probability"))
        for file, guesses in rows:
            out.writerows((file, place, name, value) for place, (name, value) in enumerate(guesses, 1))
        try:
            checkpoint.write_aside(args.csv, lambda aside: aside.write_text(text.getvalue()))
        except OSError as error:
            print(f"predict: {error}", file=sys.stderr)
            return 1
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

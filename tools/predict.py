"""Classify pictures: the k most likely classes of each, with their probabilities.

python tools/predict.py cat.jpg holidays/ --checkpoint output/vig_photos/best.safetensors
visionmix predict cat.jpg --model vig_s --pretrained --topk 3
visionmix predict photos/ shards/*.tar --model vig_s --pretrained --output guesses.parquet --features
visionmix predict "https://host/photos-{000..127}.tar" --model vig_s --pretrained --output guesses.csv
torchrun --nproc-per-node 8 tools/predict.py photos/ --model vig_s --pretrained --output guesses.csv

The output has a row for each picture; of one that cannot be read, with the reason. A call that was stopped goes on when
it is made again.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch.utils.data import DataLoader

from visionmix.tools import data, display, models, predictions, processes, remote
from visionmix.tools.arguments import check_least
from visionmix.tools.items import Item, ItemSet, collate, find_items

PART_SECONDS = 30  # of work that a stop may lose
SHOWN = 20  # pictures named that cannot be read, where the output names all


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "images", nargs="+", help="pictures, .tar shards of them, folders of both, or URLs of shards, with {000..127}"
    )
    parse.add_argument("--model", help="timm model name; a checkpoint of train.py, or a folder, knows its own")
    parse.add_argument("--checkpoint", help="weights: .pt, .pth, .safetensors, or a folder of timm's save_for_hf")
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument(
        "--num-classes", type=int, help="outputs that the weights must have; any other number is refused"
    )
    parse.add_argument("--topk", type=int, default=5, help="classes an image (default: %(default)s)")
    parse.add_argument("--features", action="store_true", help="write the pooled features before the classifier too")
    parse.add_argument("--batch-size", type=int, default=32, help="images a step (default: %(default)s)")
    parse.add_argument("--workers", type=int, default=2, help="data-loading processes (default: %(default)s)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parse.add_argument("--output", type=Path, metavar="FILE", help="write a row for each picture: .csv or .parquet")
    return parse


@torch.inference_mode()
def predict(
    trained: models.Trained,
    items: list[Item],
    *,
    topk: int,
    batch: int,
    device: torch.device,
    features: bool = False,
    workers: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Yield a row for each of `items`, a batch at a time.

    A row has `image`, `error` (None, or why the picture cannot be read), `class_1` and `probability_1` of the likeliest
    class, further ones down to `topk`, and `features` where they are wanted. Probabilities of all classes have the sum
    1, except of a model trained on images of several labels.
    """
    model, settings = trained.model, trained.input
    transform = data.eval_transform(
        settings.image_size, settings.interpolation, settings.crop_pct, settings.normalise, settings.crop_mode
    )
    names = trained.classes or [str(i) for i in range(model.num_classes)]
    loader = DataLoader(
        ItemSet(items, transform),
        batch_size=batch,
        num_workers=workers if len(items) > batch else 0,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    for places, images, reasons in loader:
        rows = {place: {"image": items[place].name, "error": reason} for place, reason in reasons.items()}
        rows |= {place: {"image": items[place].name, "error": None} for place in places}
        if places:
            images, logits = images.to(device), None
            if features:
                hidden = model.forward_features(images)
                pooled = model.forward_head(hidden, pre_logits=True).float().flatten(1).tolist()
                for place, values in zip(places, pooled, strict=True):
                    rows[place]["features"] = values
                logits = model.forward_head(hidden) if topk else None
            if topk:
                logits = model(images) if logits is None else logits
                logits = logits.float()
                likely = logits.sigmoid() if trained.multilabel else logits.softmax(1)
                likely, guesses = likely.topk(topk, dim=1)
                for place, values, indices in zip(places, likely.tolist(), guesses.tolist(), strict=True):
                    for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1):
                        rows[place] |= {f"class_{rank}": names[index], f"probability_{rank}": value}
        yield [rows[place] for place in sorted(rows)]


def main(argv: list[str] | None = None) -> int:
    """Run the `predict` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        check_least(1, topk=args.topk, batch_size=args.batch_size, img_size=args.img_size, num_classes=args.num_classes)
        check_least(0, workers=args.workers)
        if args.output:
            predictions.check_output(args.output)
        elif args.features:
            raise ValueError("--features go to a file; give --output FILE")
        device, rank, world = processes.join(args.device, names_only=True)
        if world > 1 and not args.output:
            raise ValueError(f"{world} processes need one file for their guesses; give --output FILE")
        items = find_items(args.images) if rank == 0 else []
        trained = models.load_trained(
            args.checkpoint,
            name=args.model,
            pretrained=args.pretrained,
            classes=args.num_classes,
            image_size=args.img_size,
            device=device,
        )
        if trained.model.num_classes < 2 and not args.features:
            raise ValueError(
                f"{trained.name} has num_classes={trained.model.num_classes} and tells no classes apart; give a "
                "classifier, or --features for its features"
            )
        return _run(args, trained, items, device, rank, world)
    except (ValueError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    finally:
        processes.leave()


def _run(args: argparse.Namespace, trained: models.Trained, items: list[Item], device, rank: int, world: int) -> int:
    count = trained.model.num_classes
    options = {
        "topk": min(args.topk, count) if count > 1 else 0,
        "features": args.features,
        "batch": args.batch_size,
        "device": device,
        "workers": args.workers,
    }
    if not args.output:
        rows = [row for batch in predict(trained, items, **options) for row in batch]
        _show(rows)
        return _end(rows)
    about = {"weights": models.weights_hash(trained.model), "input": trained.input.to_dict()}
    about |= {"topk": options["topk"], "features": args.features}
    names = predictions.columns(options["topk"], args.features)
    parts, left = None, []
    if rank == 0:
        predictions.check_replaced(args.output, {item.name for item in items})
        parts = predictions.Parts(args.output, names, about)
        done = parts.done()
        left = [item for item in items if item.name not in done]
        if len(left) < len(items):
            print(f"{len(items) - len(left)} of {len(items)} pictures have rows in {parts.folder}; the others follow")
    if world > 1:
        shared = [left]
        dist.broadcast_object_list(shared)
        left = shared[0]
        parts = parts or predictions.Parts(args.output, names, about)
    first, last = np.linspace(0, len(left), world + 1).round().astype(int)[rank : rank + 2]
    own = left[first:last]
    remote.fetch(sorted({item.file for item in own}))  # other machines have caches of their own
    with display.Display(1, -(-len(own) // args.batch_size), quiet=rank > 0) as shown:
        shown.begin(1, "predict", shown.steps)
        waiting, since = [], time.monotonic()
        for rows in predict(trained, own, **options):
            waiting += rows
            shown.step(len(rows))
            if time.monotonic() - since > PART_SECONDS:
                parts.add(waiting)
                waiting, since = [], time.monotonic()
        parts.add(waiting)
    if world > 1:
        dist.barrier()
    if rank:
        return 0
    rows = parts.join([item.name for item in items])
    unread = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} pictures, {unread} of which cannot be read, in {args.output}")
    return _end(rows, SHOWN)


def _show(rows: list[dict[str, Any]]) -> None:
    """Print a table of the guesses."""
    table = Table("image", "class", "probability", box=None, header_style="bold")
    for row in rows:
        guesses = [key.removeprefix("class_") for key in row if key.startswith("class_")]
        for place in guesses:
            first = place == "1"
            table.add_row(
                row["image"] if first else "",
                row[f"class_{place}"],
                f"{100 * row[f'probability_{place}']:.1f} %",
                style="bold" if first else "dim",
            )
    display.table_console().print(table)


def _end(rows: list[dict[str, Any]], most: int | None = None) -> int:
    """Name the pictures that cannot be read, `most` at most, and return the exit status."""
    unread = [row for row in rows if row["error"]]
    for row in unread[:most]:
        print(f"predict: left out, cannot be read: {row['image']}: {row['error']}", file=sys.stderr)
    if most and len(unread) > most:
        print(f"predict: and {len(unread) - most} more", file=sys.stderr)
    return 0 if len(unread) < len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

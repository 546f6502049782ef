"""Test a trained model under token reductions: accuracy, images a second and operations of every setting, and a curve.

    visionmix reduce-curve deit_small_patch16_224 --pretrained --data /data/imagenet
    visionmix reduce-curve --checkpoint output/vit/best.safetensors --data photos --methods tome evit
    visionmix reduce-curve deit_small_patch16_224 --pretrained --data /data/imagenet --reduce "tome:r=(13, -1.0)"

Without `--methods` these are all that fit the model and need no parameters of their own, each over five or more
settings that follow its tokens and depth; `--reduce` adds others. The model itself comes first. Since a machine's speed
changes, each setting is timed in turns with the whole model. Each row goes into the CSV file when it is measured, and a
call that is made again goes on with the settings that have none. Methods that are trained with the model (dynamicvit,
avit) are left to `visionmix validate`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionmix.reduction import apply, list_methods
from visionmix.reduction.sharing import Reduced
from visionmix.registry import nearest
from visionmix.tools import data, models, pictures, timing, validate
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.class_map import find_outputs
from visionmix.tools.evaluation import evaluate
from visionmix.tools.rows import append_rows, has_row, read_rows

COLUMNS = (
    "model", "checkpoint", "data", "reduction", "image_size", "images", "top1", "gmacs", "images_per_second",
    "speedup", "batch_size", "device", "threads", "torch", "weights_hash",
)  # fmt: skip
# Columns in which a row must agree to stand for a setting.
KEY = ("data", "reduction", "image_size", "weights_hash", "batch_size", "device", "threads")
RATES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of tokens that stay in a block that prunes
SHARES = (0.25, 0.45, 0.6, 0.75, 0.9)  # of all cells, that are merged over the blocks
COUNTED = 8  # images whose operations are counted, since they may differ
ROUNDS, SECONDS = (5, 40), 3.0  # of timing, at least and at most, and what these should take


def settings(method: str, cells: int, depth: int) -> list[str]:
    """Return the settings of a method that are tested on a model of `depth` blocks and so many cells, mild ones first.

    Raises:
        ValueError: there is no such method, or it is trained with the model.
    """
    blocks = {"tome": depth, "mctf": depth - 1, "rmeeto": max((depth - 1) // 2, 1)}
    if method in blocks:
        return list(dict.fromkeys(f"{method}:r={max(round(share * cells / blocks[method]), 1)}" for share in SHARES))
    if method in ("evit", "ssm_prune"):
        return [f"{method}:keep_rate={rate}" for rate in RATES]
    if method == "mctf_fast":
        return [f"{method}:r={1 - rate:.1f}" for rate in RATES]
    if method == "ats":
        return [f"{method}:samples={round(rate * cells)}" for rate in (*RATES, 0.35, 0.25)]
    if method == "algm":
        return [f"{method}:threshold={threshold}" for threshold in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)]
    if method == "zero_tprune":
        layers = sorted({depth * quarter // 4 for quarter in (1, 2, 3)})
        options = f"layers={layers}, similar={cells // 20}"
        return [f"{method}:keep_rates={[rate] * len(layers)}, {options}" for rate in RATES]
    if method in list_methods():
        raise ValueError(
            f"--methods {method}: it is trained with the model, by model.reduction of visionmix train; compare by "
            "visionmix validate --checkpoint, or give a setting by --reduce"
        )
    raise ValueError(f"--methods {method}: there is no such method{nearest(method, list_methods())}")


def chosen(model: nn.Module, methods: Sequence[str] | None, more: Sequence[str]) -> Iterator[str]:
    """Return the reductions to test: those of `methods`, or of all that fit the model, and `more`.

    Raises:
        TypeError: a method does not fit the model.
        ValueError: a method is unknown or does not fit, or the model is reduced already.
    """
    if isinstance(model, Reduced):
        raise ValueError(f"the model is reduced already, by {model.reduction!r}; give one that was trained without")
    if not isinstance(getattr(model, "blocks", None), nn.Module):
        raise TypeError(f"a model of class {type(model).__qualname__} has no list of blocks; give a plain model")
    rows, columns = model.grid_size if hasattr(model, "grid_size") else model.patch_embed.grid_size
    for method in methods or list_methods():
        try:
            specs = settings(method, rows * columns, len(model.blocks))
            for spec in specs:
                apply(model, spec)
        except (TypeError, ValueError) as error:
            if methods:
                raise
            print(f"{method} is left out: {error}")
            continue
        yield from specs
    for spec in more:
        apply(model, spec)
        yield spec


def gmacs(model: nn.Module, images: Tensor) -> float:
    """Return the multiply-accumulates of a forward pass, in billions, as a mean over images that go one by one."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for image in images:
            model(image[None])
    return counter.get_total_flops() / 2 / len(images) / 1e9


class Curve:
    """The tests that a command line asks for.

    Args:
        args: of `parser`.

    Raises:
        OSError: a file cannot be read.
        TypeError: the model, or a method on it, cannot be reduced.
        ValueError: the arguments contradict each other, or the data are of other classes than the model.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, models.choose_device(args.device)
        given = {"name": args.model, "pretrained": args.pretrained, "image_size": args.img_size}
        self.trained = models.load_trained(args.checkpoint, **given, device=self.device)
        self.specs = ["", *chosen(self.trained.model, args.methods, args.reduce)]
        wanted = validate.test_data(args.data, None)
        classes, take = data.split_classes(wanted, "val"), self.trained.input
        outputs = find_outputs(classes, self.trained.outputs, wanted.path, None)
        transform = data.eval_transform(
            take.image_size, take.interpolation, take.crop_pct, take.normalise, take.crop_mode
        )
        self.dataset = data.open_split(wanted, "val", classes, transform, outputs=outputs)
        self.rows = read_rows(args.csv, COLUMNS)
        self.about = {
            "model": self.trained.name,
            "checkpoint": args.checkpoint or "pretrained",
            "data": str(wanted.path),
            "image_size": take.image_size,
            "batch_size": args.batch_size,
            **{key: value for key, value in timing.conditions(self.device.type).items() if key in COLUMNS},
            "weights_hash": models.weights_hash(self.trained.model),
        }

    def sample(self) -> Tensor:
        """Return a batch of test images, from the first to the last at equal distances."""
        places = torch.linspace(0, len(self.dataset) - 1, self.args.batch_size).long().tolist()
        batch = data.collate([self.dataset[data.Key(0, place)] for place in places])
        if not len(batch.targets):
            raise data.UnreadableData(f"no image can be read: {', '.join(batch.unreadable[:3])}")
        return batch.images.to(self.device)

    def missing(self) -> list[str]:
        """Return the settings that the CSV file lacks; a row without its time stands for a test without one."""
        kept = [row for row in self.rows if self.args.no_time or row["images_per_second"]]
        return [spec for spec in self.specs if not has_row(kept, self.about | {"reduction": spec}, KEY)]

    def run(self, spec: str, sample: Tensor) -> dict[str, Any]:
        """Make a test and return its row.

        Raises:
            NoisyMachine: other processes keep the machine busy, so that nothing is timed.
            UnreadableData: no image can be read.
        """
        model = apply(self.trained.model, spec) if spec else self.trained.model
        speed = {} if self.args.no_time else self.speed(model, sample)
        loader = data.make_loader(self.dataset, batch=self.args.batch_size, workers=self.args.workers, shuffle=False)
        result = evaluate(model, loader, classes=self.trained.model.num_classes, device=self.device)
        row = {"reduction": spec, "images": result.count, "top1": result.top1, "gmacs": gmacs(model, sample[:COUNTED])}
        row = self.about | row | speed
        return {column: row.get(column, "") for column in COLUMNS}

    def speed(self, model: nn.Module, sample: Tensor) -> dict[str, float]:
        """Return the images a second of a model, and how many times those of the whole model in turns with it.

        Raises:
            NoisyMachine: other processes keep the machine busy.
        """
        if self.device.type == "cpu":
            timing.wait_until_quiet()
        calls = {"whole": lambda: self.trained.model(sample), "reduced": lambda: model(sample)}
        with torch.inference_mode():
            first = timing.in_turns(calls, 1)
            rounds = int(SECONDS / (first["whole"][0] + first["reduced"][0]))
            times = timing.in_turns(calls, min(max(rounds, ROUNDS[0]), ROUNDS[1]))
        whole, reduced = (timing.spread(times[name]).p50 for name in calls)
        if model is self.trained.model:  # both calls are of this model
            whole = reduced
        return {"images_per_second": len(sample) / reduced, "speedup": whole / reduced}

    def measured(self) -> list[dict[str, str]]:
        """Return the CSV file's rows of these tests, the last of each setting, in their order."""
        rows = {row["reduction"]: row for row in read_rows(self.args.csv, COLUMNS)
                if has_row([row], self.about | {"reduction": row["reduction"]}, KEY)}  # fmt: skip
        return [rows[spec] for spec in self.specs if spec in rows]


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix reduce-curve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("model", nargs="?", help="timm model name; a checkpoint of train knows its own")
    parse.add_argument("--checkpoint", help="weights: .pt, .pth, .safetensors, or a folder")
    parse.add_argument("--pretrained", action="store_true", help="the published weights")
    parse.add_argument("--data", required=True, help="test images, as visionmix validate takes them")
    parse.add_argument("--methods", nargs="+", help="methods to test (default: all that fit)")
    parse.add_argument("--reduce", action="append", default=[], metavar="METHOD:OPTIONS", help="a further setting")
    parse.add_argument("--csv", type=Path, default=Path("reduction.csv"), help="the rows (default: %(default)s)")
    parse.add_argument("--out", type=Path, default=Path("reduction.png"), help="the picture (default: %(default)s)")
    parse.add_argument("--batch-size", type=int, default=64, help="images a step (default: %(default)s)")
    parse.add_argument("--workers", type=int, default=0, help="data-loading processes (default: %(default)s)")
    parse.add_argument("--img-size", type=int, help="side of the input in pixels")
    parse.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parse.add_argument("--no-time", action="store_true", help="leave out the time, which needs a quiet machine")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return parse


def main(argv: list[str] | None = None) -> int:
    """Run the `reduce-curve` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        check_least(1, batch_size=args.batch_size, img_size=args.img_size, threads=args.threads)
        check_least(0, workers=args.workers)
        check_out(args.csv, name="--csv")
        check_out(args.out)
        if args.threads:
            torch.set_num_threads(args.threads)
        curve = Curve(args)
        missing = curve.missing()
        sample = curve.sample() if missing else None
        for spec in missing:
            row = curve.run(spec, sample)
            append_rows(args.csv, [row], COLUMNS)
            timed = bool(row["images_per_second"])
            speed = f", {row['images_per_second']:.0f} images/s, {row['speedup']:.2f} times" if timed else ""
            print(f"{spec or 'whole model':<48} {row['top1']:6.2f} %, {row['gmacs']:.4g} GMACs{speed}", flush=True)
        rows = curve.measured()
        pictures.draw_reductions(rows, args.out)
    except (ValueError, TypeError, OSError, timing.NoisyMachine) as error:
        print(f"reduce-curve: {error}", file=sys.stderr)
        return 1 if isinstance(error, timing.NoisyMachine) else 2
    print(f"{len(rows)} settings in {args.csv}, drawn to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

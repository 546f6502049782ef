"""Draw ImageNet top-1 accuracy against the time of one image on this CPU, our models beside timm's.

    python tools/draw_speed.py --measure benchmarks/speed.csv --out docs/images/speed.png    # measure, then draw
    python tools/draw_speed.py benchmarks/speed.csv --out docs/images/speed.png              # draw what was measured

Accuracies are published ones; none is measured here. Each model sees images of the size of its published accuracy, one
at a time, in float32. --measure takes about five minutes and refuses a busy machine; it rewrites the file, with the
columns of tools/benchmark.py.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from visionmix.models import published
from visionmix.tools import benchmark, pictures, timing
from visionmix.tools.arguments import check_out

OURS = (
    *("nat_mini", "nat_tiny", "vmamba_tiny", "vig_t", "vig_s", "vig_h_t", "agent_swin_tiny", "agent_pvt_small"),
    *("ravlt_small", "msvmamba_micro", "msvmamba_tiny", "plainmamba_l1", "efficient_vmamba_base", "dinats_tiny"),
)


@dataclass(frozen=True)
class Peer:
    """A model of timm's: ImageNet-1k top-1 in percent, without distillation or other data, at images of `img_size`."""

    top1: float
    source: str
    img_size: int = 224


_RESULTS = "timm's results/results-imagenet.csv"
_CPUBONE = "github.com/huggingface/pytorch-image-models/pull/2732"
PEERS = {
    "swin_tiny_patch4_window7_224": Peer(81.39, _RESULTS),
    "convnext_tiny": Peer(82.07, _RESULTS),
    "mambaout_tiny": Peer(82.74, _RESULTS),
    "cpubone_b1_bfrobust": Peer(78.97, _CPUBONE),
    "cpubone_b3": Peer(83.13, _CPUBONE),
    "lowformer_b1": Peer(79.9, "LowFormer, arXiv 2409.03460"),
    "efficientvim_m4": Peer(79.4, "EfficientViM, arXiv 2411.15241, 300 epochs", 256),
}


def measure(path: Path) -> None:
    """Time every model, and write a row per model to the CSV file `path` when all are done.

    Raises:
        NoisyMachine: the machine is too busy; the file does not change.
    """
    sizes = {**dict.fromkeys(OURS, 224), **{name: peer.img_size for name, peer in PEERS.items()}}
    options = {"batch": 1, "train": False, "device": "cpu", "amp": "", "memory": False}
    rows = []
    for name, img_size in sizes.items():
        rows.append(benchmark.run(name, img_size=img_size, **options))
        print(f"{name:<32}{rows[-1]['p50_ms']:>8} ms", flush=True)
    path.unlink(missing_ok=True)
    timing.append_rows(path, rows)


def read(path: Path) -> tuple[dict[str, float], dict[str, float], str]:
    """Return top-1 accuracies and milliseconds by model of a file that `measure` wrote, and the conditions of all rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no rows, rows of several machines, or a model without a published accuracy.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    conditions = {f"{row['device']}, {row['threads']} threads, torch {row['torch'].partition('+')[0]}" for row in rows}
    if len(conditions) != 1:
        raise ValueError(f"{path} has {len(conditions)} machines or versions; measure all models in one run: --measure")
    top1 = {row["model"]: PEERS[row["model"]].top1 if row["model"] in PEERS else published(row["model"]).top1
            for row in rows}  # fmt: skip
    unknown = [name for name, value in top1.items() if value is None]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]}, whose top-1 is not published; leave it out")
    return top1, {row["model"]: float(row["p50_ms"]) for row in rows}, conditions.pop()


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionmix draw-speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, help="the measurements")
    parser.add_argument("--measure", action="store_true", help="measure first, and write the measurements anew")
    parser.add_argument("--threads", type=int, default=2, help="of the measurement (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("speed.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        check_out(args.out, (".png",))
        if args.measure:
            torch.set_num_threads(args.threads)
            measure(args.csv)
        top1, milliseconds, conditions = read(args.csv)
        pictures.draw_trade_off(
            top1,
            milliseconds,
            f"one image, ms ({conditions})",
            args.out,
            groups={"visionmix": [name for name in top1 if name not in PEERS], "timm": list(PEERS)},
        )
    except (ValueError, OSError, timing.NoisyMachine) as error:
        print(f"draw-speed: {error}", file=sys.stderr)
        return 1
    print(f"{len(top1)} models drawn to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

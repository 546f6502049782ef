"""Train one skeleton with every mixer in turn, under one recipe, and compare accuracy, time and memory.

    python tools/bakeoff.py configs/demo/bakeoff.yaml --data data/photos
    visionmix bakeoff imagenet/bakeoff.yaml --data /data/imagenet --nproc-per-node 8 --seeds 0 1 2

The recipe's model is the skeleton; the parameters of the mixer that it names are the measure. The hidden width of the
feed-forwards is set so that every other mixer's model has as many within 3 %; where even narrow ones have too many, the
mixer's own `expand` is halved first. Each run is one of tools/train.py, in its own folder under --output, and resumes
where it stopped. Leaves results.csv (a row per run), results.md, accuracy_time.png and accuracy_memory.png, and, of the
best weights of each mixer's first run on test images, attention.png (what one cell attends to, in every layer) and
receptive_field.png. Called again for finished runs, it draws them anew.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch

from visionmix import list_mixers
from visionmix.mixers.registry import mixer_options
from visionmix.tools import (
    data,
    draw_attention,
    draw_receptive_field,
    influence,
    pictures,
    recipe,
    recipe_keys,
    shown,
    timing,
)
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.checkpoint import write_aside

_AGREE = 0.03
_RATIOS = (0.5, 32.0)  # of the hidden width that is searched
_HALVINGS = 4  # of a mixer's expand
_IMAGES = 16  # of receptive fields
_MIDDLE = (0.5, 0.5)


def count_parameters(model: recipe_keys.ModelRecipe, num_classes: int, mixer: str | dict, mlp_ratio: float) -> int:
    """Return the parameters of the recipe's model with this mixer and ratio, without building it for real."""
    kwargs = model.kwargs | {"mixer": mixer, "mlp_ratio": mlp_ratio}
    with torch.device("meta"):
        built = timm.create_model(model.name, num_classes=num_classes, **kwargs)
    return sum(value.numel() for value in built.parameters())


def fit_ratio(count: Callable[[float], int], wanted: int) -> float:
    """Return the ratio of hidden width at which `count` is within 3 % of `wanted`, to the nearest hundredth.

    Args:
        count: Parameters by ratio; grows with it.
        wanted: Parameters to reach.

    Raises:
        ValueError: no ratio between 0.5 and 32 reaches it.
    """
    low, high = _RATIOS
    fewest, most = count(low), count(high)
    # Parameters grow linearly with the hidden width, but for its rounding to whole channels.
    ratio = round(min(max(low + (high - low) * (wanted - fewest) / (most - fewest), low), high), 2)
    if abs(count(ratio) - wanted) > _AGREE * wanted:
        raise ValueError(
            f"no feed-forward makes {wanted} parameters: {fewest} at a ratio of {low}, {most} at {high}; leave "
            "this mixer out, or give the recipe's model other widths"
        )
    return ratio


def fit_mixer(model: recipe_keys.ModelRecipe, num_classes: int, name: str, wanted: int) -> dict[str, object]:
    """Return the model's arguments with which the mixer called `name` makes `wanted` parameters, within 3 %.

    Raises:
        ValueError: there are none.
    """
    expand = mixer_options(name).get("expand")
    specs: list[str | dict] = [name]
    if expand is not None:
        specs += [{"name": name, "expand": expand.default / 2**power} for power in range(1, _HALVINGS + 1)]
    if "num_heads" in mixer_options(name):  # where the model's heads do not fit
        specs.append({"name": name, "num_heads": 1})
    for spec in specs:
        try:
            ratio = fit_ratio(lambda value, spec=spec: count_parameters(model, num_classes, spec, value), wanted)
        except ValueError as error:
            refusal = f"mixer {name!r}: {error}"
            continue
        return model.kwargs | {"mixer": spec, "mlp_ratio": ratio}
    raise ValueError(refusal)


def _call(name: str, num_classes: int, kwargs: dict, image_size: int, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).to(device).eval()
    images = torch.randn(1, 3, image_size, image_size, device=device)

    def infer() -> None:
        with torch.inference_mode():
            model(images)

    return infer


def cost(made: recipe.Recipe, num_classes: int, kwargs: dict) -> dict[str, object]:
    """Return the time and the peak memory of a forward pass of one image, and the conditions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timing.wait_until_quiet()
    spec = {"name": made.model.name, "num_classes": num_classes, "kwargs": kwargs, "image_size": made.data.image_size}
    call = _call(**spec, device=device)
    time = timing.measure(call)
    child = [__file__, "--child", json.dumps(spec)]
    memory = timing.peak_memory(child) if device == "cpu" else timing.peak_gpu_memory(call)
    return {"forward_ms": f"{time.p50 * 1e3:.4g}", "peak_mb": f"{memory / 1e6:.4g}", **timing.conditions(device)}


def train(args: argparse.Namespace, folder: Path, kwargs: dict, seed: int) -> list[dict[str, str]]:
    """Run or resume tools/train.py in `folder`; return its summary, a row per epoch.

    Raises:
        RuntimeError: the run failed.
    """
    start = [sys.executable]
    if args.nproc_per_node > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(args.nproc_per_node)]
    settings = [f"model.kwargs={json.dumps(kwargs)}", *args.set]
    command = [*start, str(Path(__file__).with_name("train.py")), args.recipe, "--data", str(args.data), "--output",
               str(folder), "--seed", str(seed), "--resume"]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    if (status := subprocess.run(command).returncode) != 0:
        raise RuntimeError(f"training in {folder} ended with status {status}; run this again to resume it")
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[dict[str, object]]) -> str:
    """Return the results in Markdown, the mean and the spread over seeds, best first."""
    lines = ["| mixer | parameters, M | MLP ratio | top-1, % | forward, ms | peak memory, MB |", "| --- " * 6 + "|"]
    for mixer, runs in sorted(_by_mixer(rows).items(), key=lambda item: -_mean(item[1])):
        accuracies = [float(run["top1"]) for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        first = runs[0]
        lines.append(
            f"| `{mixer}` | {first['params_m']} | {first['mlp_ratio']} | {_mean(runs):.2f}{spread} | "
            f"{first['forward_ms']} | {first['peak_mb']} |"
        )
    return "\n".join(lines) + "\n"


def _by_mixer(rows: Sequence[dict[str, object]]) -> dict[str, list[dict[str, object]]]:
    grouped: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        grouped.setdefault(str(row["mixer"]), []).append(row)
    return grouped


def _mean(runs: Sequence[dict[str, object]]) -> float:
    return statistics.mean(float(run["top1"]) for run in runs)


def write_results(output: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write the CSV, the table and the pictures of all runs so far."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_aside(output / "results.csv", write)
    write_aside(output / "results.md", lambda aside: aside.write_text(table(rows)))
    grouped = _by_mixer(rows)
    accuracy = {mixer: _mean(runs) for mixer, runs in grouped.items()}
    for file, column, label in (
        ("accuracy_time.png", "forward_ms", "forward pass of one image, ms"),
        ("accuracy_memory.png", "peak_mb", "peak memory of a forward pass, MB"),
    ):
        against = {mixer: float(runs[0][column]) for mixer, runs in grouped.items()}
        pictures.draw_trade_off(accuracy, against, label, output / file)


def draw_mixers(output: Path, mixers: Sequence[str], seed: int, images: Sequence[Path]) -> None:
    """Draw what every mixer's trained model attends to and which pixels it sees.

    Args:
        output: The folder of the runs.
        mixers: Their mixers.
        seed: Which run of each.
        images: Test images; attention is drawn on the first.
    """
    rows, fields = {}, {}
    for mixer in mixers:
        model = shown.load(None, checkpoint=str(output / f"{mixer}-{seed}" / "best.safetensors"))
        given = shown.show(model, [str(image) for image in images])
        rows[mixer] = (given.pictures[0], influence.attention_rows(model, given.images[:1], _MIDDLE))
        fields[mixer] = influence.receptive_field(model, given.images)
    draw_attention.draw_attention(rows, output / "attention.png", "what the cell in the ring attends to")
    title = f"effective receptive fields, {len(images)} test images"
    draw_receptive_field.draw_receptive_fields(fields, output / "receptive_field.png", title)


def run(args: argparse.Namespace) -> None:
    """Train and measure every mixer with every seed.

    Raises:
        ValueError: the recipe or a mixer is refused.
        RuntimeError: a training failed, or the machine is too busy to measure.
    """
    made = recipe.read(args.recipe, {}, args.set)
    check_least(1, nproc_per_node=args.nproc_per_node)
    check_out(args.output / "results.csv", name="--output")
    unknown = sorted(set(args.mixers) - set(list_mixers()))
    if unknown:
        raise ValueError(f"--mixers {unknown[0]} is not a mixer; the mixers are {list_mixers()}")
    base = made.model.kwargs.get("mlp_ratio", 4.0)
    num_classes = len(data.check_folders(args.data))
    wanted = count_parameters(made.model, num_classes, made.model.kwargs.get("mixer", "softmax"), base)
    fitted = {mixer: fit_mixer(made.model, num_classes, mixer, wanted) for mixer in args.mixers}
    rows: list[dict[str, object]] = []
    for mixer, kwargs in fitted.items():
        params = count_parameters(made.model, num_classes, kwargs["mixer"], kwargs["mlp_ratio"])
        measured = cost(made, num_classes, kwargs)
        for seed in args.seeds:
            summary = train(args, args.output / f"{mixer}-{seed}", kwargs, seed)
            rows.append(
                {
                    "mixer": mixer,
                    "seed": seed,
                    "top1": summary[-1]["test_top1"],
                    "best_top1": max(float(row["test_top1"]) for row in summary),
                    "epochs": summary[-1]["epoch"],
                    "train_seconds": f"{sum(float(row['seconds']) for row in summary):.4g}",
                    "params_m": f"{params / 1e6:.4g}",
                    "mlp_ratio": kwargs["mlp_ratio"],
                    "expand": kwargs["mixer"]["expand"] if isinstance(kwargs["mixer"], dict) else "",
                    "skeleton": made.model.name,
                    **measured,
                }
            )
            write_results(args.output, rows)
    files = sorted(path for path in (args.data / "val").glob("*/*") if path.is_file())
    # At equal distances, so that all classes are among them.
    images = [files[at * len(files) // _IMAGES] for at in range(min(_IMAGES, len(files)))]
    draw_mixers(args.output, list(fitted), args.seeds[0], images)
    print(table(rows))


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionmix bakeoff", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="recipe: a path, or a packaged name such as demo/bakeoff.yaml")
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--mixers", nargs="+", default=list_mixers(), help="which; all registered ones unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("output/bakeoff"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="processes of each training, through torchrun")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        timing.print_growth(_call(**json.loads(args.child), device="cpu"))
        return 0
    if not args.recipe or not args.data:
        parser.error("give a recipe and --data")
    try:
        run(args)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"bakeoff: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

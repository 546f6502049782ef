"""Train a classifier on an image folder by a recipe.

    python tools/train.py configs/imagenet/vig_s.yaml --data /data/imagenet
    visionmix train imagenet/vig_s.yaml --data /data/imagenet --epochs 100 --set optimizer.weight_decay=0.05
    torchrun --nproc-per-node 8 --max-restarts 3 tools/train.py configs/imagenet/vig_s.yaml --data DATA --resume

Leaves in --output: checkpoints/ (to resume from, or for validate and predict), best.safetensors (the best epoch's
weights alone), summary.csv (a row an epoch), tensorboard/, curves.png, confusion.png and predictions.png.
"""

import argparse
import csv
import shlex
import sys
import time
from pathlib import Path

import torch

from visionmix.tools import checkpoint, data, evaluation, logs, pictures, processes, recipe, recipe_keys, saving
from visionmix.tools.arguments import check_out
from visionmix.tools.calibration import calibrate
from visionmix.tools.display import Display, duration
from visionmix.tools.score import score, score_text
from visionmix.tools.stopping import Interrupted, Stop
from visionmix.tools.trainer import Trainer

FOLDER = "checkpoints"  # in the output folder

# Flags for the most common changes; everything else goes through --set.
FLAGS = {
    "data": ("data.path", str, "folder of images or shards, or hf:NAME, with train and val"),
    "model": ("model.name", str, "timm model name"),
    "epochs": ("schedule.epochs", int, "epochs in all"),
    "batch_size": ("data.batch_size", int, "images a process takes at once"),
    "lr": ("optimizer.lr", float, "peak learning rate, for optimizer.lr_batch images a step"),
    "img_size": ("data.image_size", int, "side of the input in pixels"),
    "workers": ("data.workers", int, "data-loading processes of each process"),
    "seed": ("train.seed", int, "of weights, data order and augmentation"),
    "amp": ("train.amp", str, "mixed precision: none, float16, bfloat16 or pure_bfloat16"),
}


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("recipe", nargs="?", help="recipe: a path, or a packaged name such as imagenet/vig_s.yaml")
    for name, (key, kind, text) in FLAGS.items():
        parse.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} ({key})")
    parse.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. optimizer.lr=1e-3"
    )
    parse.add_argument("--keys", action="store_true", help="print the keys of a recipe with defaults and meanings")
    parse.add_argument("--output", type=Path, help="folder of the results (default: output/RECIPE)")
    parse.add_argument(
        "--resume", nargs="?", const="", metavar="FILE",
        help="go on from this checkpoint, or the last one of this run's folder; without FILE, from the last one in the "
        "output folder if there is one",
    )  # fmt: skip
    parse.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds a run")
    parse.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return parse


def find_start(args: argparse.Namespace) -> tuple[Path, Path | None, list[Path]]:
    """Return (output folder, checkpoint to go on from or None, unfinished ones that are passed over).

    Raises:
        FileNotFoundError: when the checkpoint is not there.
        FileExistsError: when the output folder holds a run and neither --resume nor --overwrite is given.
        ValueError: at a wrong combination of arguments.
    """
    if args.resume and args.overwrite:
        raise ValueError("--resume FILE and --overwrite contradict each other; give one of them")
    if not args.recipe and not args.resume:
        raise ValueError("give a recipe, e.g. imagenet/vig_s.yaml, or --resume FILE")
    if args.resume:
        last, broken = Path(args.resume), []
        output = last if (last / FOLDER).is_dir() else last.parent.parent
        if output == last:
            last, broken = saving.newest(output / FOLDER)
            if last is None:
                raise FileNotFoundError(f"{output / FOLDER} holds no whole checkpoint")
        return args.output or (Path("output") / Path(args.recipe).stem if args.recipe else output), last, broken
    output = args.output or Path("output") / Path(args.recipe).stem
    last, broken = saving.newest(output / FOLDER)
    if args.overwrite:
        last, broken = None, []
    elif last and args.resume is None:
        raise FileExistsError(f"{output} holds a run; --resume goes on with it, --overwrite starts again")
    return output, last, broken


def prepare(args: argparse.Namespace, last: Path | None) -> tuple[recipe.Recipe, dict | None]:
    """Return (recipe, content of the checkpoint to go on from), everything checked.

    Raises:
        FileNotFoundError: when the recipe, the checkpoint or the data is not there.
        ValueError: at a wrong key, value or combination of arguments.
        TypeError: at a recipe value of the wrong type.
    """
    overrides: dict = {}
    for name, (key, _, _) in FLAGS.items():
        if (value := getattr(args, name)) is not None:
            section, option = key.split(".")
            overrides.setdefault(section, {})[option] = value
    content = checkpoint.read(last) if last else None
    if content and "recipe" not in content:
        raise ValueError(f"{last} is not a checkpoint of train.py; it holds no recipe to go on with")
    if args.recipe:
        made = recipe.read(args.recipe, overrides, args.set)
    else:
        made = recipe.override(content["recipe"], str(last), overrides, args.set)
    if made.data.path is None:
        raise ValueError("--data is missing: give the folder that holds train/ and val/")
    logs.check_installed(made)
    made.data.path = data.absolute(made.data.path)
    if made.distill.checkpoint:
        made.distill.checkpoint = str(Path(made.distill.checkpoint).resolve())
    return made, content


def write_summary(path: Path, history: list[dict]) -> None:
    """Write the rows of all finished epochs as CSV."""

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as file:
            table = csv.DictWriter(file, dict.fromkeys(column for row in history for column in row))
            table.writeheader()
            table.writerows(history)

    checkpoint.write_aside(path, write)


def resume_command(path: Path, *more: str) -> str:
    """Return the command that resumes the run in a folder."""
    start = ["python", sys.argv[0]] if sys.argv[0].endswith("train.py") else ["visionmix", "train"]
    return shlex.join([*start, "--resume", str(path), *more])


def run_epochs(
    trainer: Trainer, train_loader, test_loader, output: Path, display: Display, stop: Stop, saver: saving.Saver
) -> None:
    """Train and test until the recipe's last epoch, saving on the way; raises as `Trainer.train_epoch` does."""
    main = trainer.rank == 0

    def after_step() -> None:
        if saver.due(trainer.step):
            best = saving.name_of(best_row(trainer)["epoch"]) if trainer.history else None
            saver.save(saving.name_of(trainer.epoch, trainer.step), trainer.state(train_loader), best)

    while trainer.epoch < trainer.recipe.schedule.last_epoch:
        start, first = time.perf_counter(), trainer.step
        loss, unreadable = trainer.train_epoch(train_loader, display, stop, after_step)
        trained = time.perf_counter() - start
        result = trainer.test(test_loader, display, stop)
        unreadable += result.unreadable
        row = {
            "epoch": trainer.epoch + 1,
            "train_loss": loss,
            "test_loss": result.loss,
            **{f"test_{name}": value for name, value in result.figures.items()},
            "lr": trainer.sums.lr,
            "images_per_second": (trainer.step - first) * trainer.images_a_step / trained,
            "seconds": time.perf_counter() - start,
            "unreadable": len(unreadable),
            **{f"loss_{name}": value.item() for name, value in trainer.own_losses.items()},
            **{f"seconds_{part}": value for part, value in trainer.watch.totals().items()},
        }
        best = trainer.finish_epoch(row)
        display.end_epoch(row, best)
        trainer.logs.epoch(trainer.step, row)
        if unreadable:
            display.note(f"{len(unreadable)} image(s) cannot be read and were left out in this epoch:", "yellow")
            for path in unreadable:
                display.note(f"  {path}", "yellow")
        content = trainer.state()
        saver.save(saving.name_of(trainer.epoch), content, saving.name_of(best_row(trainer)["epoch"]))
        if main:
            try:
                if best:
                    about = {key: content[key] for key in ("recipe", "classes", "input", "epoch")}
                    weights = checkpoint.without_splits(trainer.tested.state_dict())
                    checkpoint.save_weights(output / "best.safetensors", weights, about)
                write_summary(output / "summary.csv", trainer.history)
            except OSError as error:
                display.note(f"{error}; the training goes on", "bold red")
    saver.wait()


def best_row(trainer: Trainer) -> dict:
    """Return the row of the first epoch with the best test figure."""
    return max(trainer.history, key=score)


def finish(trainer: Trainer, test_loader, output: Path, display: Display, stop: Stop) -> None:
    """Test the last weights once more, draw the pictures, and print the results and where the files are."""
    trainer.epoch -= 1  # so that the display counts this test to the last epoch
    result = trainer.test(test_loader, display, stop)
    trainer.epoch += 1
    if trainer.rank:
        return
    made, name = trainer.recipe, trainer.recipe.model.name
    display.note("drawing pictures ...")
    files = {name: output / f"{name}.png" for name in ("curves", "confusion", "predictions")}
    try:
        pictures.draw_curves(trainer.history, files["curves"], f"{name} on {Path(made.data.path).name}")
        if result.targets is not None:
            pictures.draw_confusion(result.confusion.numpy(), trainer.classes, files["confusion"])
        if made.data.labels:
            shown = evaluation.predict_some(
                trainer.tested, test_loader.dataset, trainer.classes, trainer.device, made.train.amp, made.train.seed
            )
            pictures.draw_predictions(*shown, files["predictions"])
    except OSError as error:  # of a full disk: the training stands without them
        display.note(str(error), "yellow")
    trainer.logs.pictures(trainer.step, {name: file for name, file in files.items() if file.is_file()})
    best = best_row(trainer)
    seconds = sum(row["seconds"] for row in trainer.history)
    display.note(
        f"\n{name}, {trainer.epoch} epochs in {duration(seconds)}: test {result.text} "
        f"of {result.count} images (best epoch {best['epoch']}: {score_text(best).strip()})",
        "bold green",
    )
    for file, meaning in (
        (f"{FOLDER}/{saving.name_of(trainer.epoch)}", "checkpoint of the last epoch"),
        (f"{FOLDER}/{saving.name_of(best['epoch'])}", "checkpoint of the best epoch"),
        ("best.safetensors", "its weights alone"),
        ("summary.csv", "a row an epoch"),
        ("curves.png", "loss and accuracy"),
        ("confusion.png", "confusion matrix"),
        ("predictions.png", "test images with predictions"),
        ("tensorboard", "figures by step and epoch, for tensorboard --logdir"),
    ):
        if (output / file).exists():
            display.note(f"  {output / file!s:<40} {meaning}")


def check_agreement(last: Path | None) -> None:
    """Check that all processes go on from the same checkpoint; raises ValueError where one does not see it."""
    each = processes.gather(str(last and last.name))
    if len(set(each)) > 1:
        raise ValueError(f"the processes see different checkpoints: {', '.join(each)}; they need the same folder")


def train(args: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    try:
        output, last, broken = find_start(args)
        check_out(output / "summary.csv", name="--output")
        made, content = prepare(args, last)
        classes = data.check_data(made.data)
        device, rank, world = processes.join(args.device)
        check_agreement(last)
    except (ValueError, TypeError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    try:
        return _train(made, output, content, last, broken, classes, device, rank, world)
    finally:
        processes.leave()


def make_run(
    made: recipe.Recipe, classes: list[str], device: torch.device, rank: int = 0, world: int = 1
) -> tuple[Trainer, data.Loader, data.Loader]:
    """Return (trainer, loader of training images, loader of test images) of a recipe, before the first step.

    Raises:
        ValueError: the recipe names a model, an optimiser or arguments that do not exist or fit, or the data are too
            few or of other classes.
        OSError: the data cannot be read.
    """
    seed = made.train.seed
    sets = {
        split: data.open_split(made.data, split, classes, seed=seed, replace=split == "train")
        for split in ("train", "val")
    }
    both = {"batch": made.data.batch_size, "workers": made.data.workers, "rank": rank, "world": world}
    train_loader = data.make_loader(
        sets["train"],
        shuffle=True,
        seed=seed,
        accumulate=made.train.accumulate,
        repeats=made.augment.repeats,
        sizes=made.data.sizes,
        **both,
    )
    test_loader = data.make_loader(sets["val"], shuffle=False, **both)
    trainer = Trainer(made, classes, len(train_loader) // made.train.accumulate, device, rank, world)
    normalise = trainer.input.normalise
    sets["train"].transform = data.train_transform(made, normalise)
    sets["val"].transform = data.eval_transform(
        made.data.image_size, made.data.interpolation, made.data.crop_pct, normalise, made.data.crop_mode
    )
    return trainer, train_loader, test_loader


def _train(made, output, content, last, broken, classes, device, rank, world) -> int:
    try:
        trainer, train_loader, test_loader = make_run(made, classes, device, rank, world)
        if content:
            trainer.load_state(content, str(last))
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    wanted = made.train
    with (
        Display(made.schedule.last_epoch, len(train_loader), quiet=rank > 0) as display,
        Stop(display.note) as stop,
        logs.Logs(None if rank else output, made, step=trainer.step, note=display.note) as trainer.logs,
    ):
        parameters = sum(p.numel() for p in trainer.model.parameters())
        images = f"{len(train_loader.dataset)} train and {len(test_loader.dataset)} test images"
        display.note(
            f"{made.model.name}: {parameters / 1e6:.2f} M parameters, {len(classes) or 'no'} classes, {images} of "
            f"{made.data.image_size} px, {world} process(es) on {device}",
            "bold",
        )
        for path in broken:
            display.note(f"passed over {path}, which was cut off while it was written", "yellow")
        if content:
            within = trainer.step - trainer.epoch * trainer.steps
            display.note(
                f"going on from {last}, {trainer.epoch} of {made.schedule.last_epoch} epochs done"
                + (f" and {within} of {trainer.steps} steps of the next" if within else "")
            )
            for line in recipe.differences(content["recipe"], recipe.to_dict(made)):
                display.note(f"  changed: {line}", "yellow")
        try:
            saver = saving.Saver(
                output / FOLDER,
                display.note,
                rank=rank,
                world=world,
                steps=wanted.save_steps,
                minutes=wanted.save_minutes,
            )
            if not content and (fitted := calibrate(trainer, train_loader.dataset)):
                display.note(f"fitted {fitted} layers to {wanted.calibrate} training images")
            run_epochs(trainer, train_loader, test_loader, output, display, stop, saver)
            finish(trainer, test_loader, output, display, stop)
        except (Interrupted, RuntimeError) as error:
            # A stop that reaches workers or other processes first shows itself here as their death.
            if not (isinstance(error, Interrupted) or stop.requested):
                raise
            saver.wait()
            saved, _ = saving.newest(output / FOLDER)
            if saved:
                display.note(f"stopped; {saved.name} is saved. To go on:", "yellow")
                display.note(f"  {resume_command(output)}")
            else:
                display.note("stopped before the first checkpoint was written; nothing is saved", "yellow")
            return 130
        except FloatingPointError as error:
            lower = f"{made.optimizer.lr / 2:g}"
            remedy = f"go on with a lower learning rate:\n  {resume_command(output, '--lr', lower)}"
            saver.wait()
            if not saving.newest(output / FOLDER)[0]:
                remedy = f"start again with a lower learning rate, e.g. --lr {lower}"
            print(f"train: {error}; {remedy}", file=sys.stderr)
            return 1
        except (OSError, data.UnreadableData) as error:
            print(f"train: {error}", file=sys.stderr)
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the `train` command with these arguments."""
    args = parser().parse_args(argv)
    if args.keys:
        print(recipe_keys.tables())
        return 0
    return train(args)


if __name__ == "__main__":
    sys.exit(main())

"""Write a model as a file that runs without its Python code, and check the file against the model.

visionmix export vig_s --pretrained --format onnx --dynamic --out vig_s.onnx
visionmix export --checkpoint output/vig_photos/best.safetensors --format openvino --half --out vig.xml
visionmix export vmamba_tiny --checkpoint vmamba_tiny.pth --format pt2 --aot --img-size 384 --out vmamba.pt2
visionmix export vig_s --pretrained --format onnx --int8 --calibrate photos/ --images test/ --out vig_s_int8.onnx

The file is written aside, read back, and compared with the model: logits for random images, at three sizes and two
batch sizes where these are dynamic, and the likeliest class of the pictures in --images. Only if it passes does it come
to --out. A file in float32 passes if no logit is off by more than 1e-4 of the largest one; of half precision and int8
the error is printed, and the agreement on pictures says whether it matters.

The file holds, as JSON under the key "visionmix", the model's name, its classes and how its images are resized and
normalised.
"""

import argparse
import copy
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from visionmix.backbones.contract import image_sides
from visionmix.tools import export_checks, export_files, export_int8, models
from visionmix.tools.arguments import check_least, check_out
from visionmix.tools.export_runs import open_file
from visionmix.tools.items import find_items

_NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_CALIBRATE_MOST, _IMAGES_MOST = 128, 256  # pictures taken of a folder
_SMALL = "pictures in half precision and int8 may be classified otherwise; give --images FOLDER to see how many"


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    parse = argparse.ArgumentParser(
        prog="visionmix export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("model", nargs="?", help="timm model name; a checkpoint of train.py, or a folder, knows its own")
    parse.add_argument("--format", choices=export_files.SUFFIXES, required=True)
    parse.add_argument("--out", type=Path, required=True, metavar="FILE", help="its name ends as the format asks for")
    weights = parse.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", help="weights: .pt, .pth, .safetensors, or a folder of timm's save_for_hf")
    weights.add_argument("--pretrained", action="store_true", help="the published weights")
    weights.add_argument("--random-weights", action="store_true", help="none, to try a format or to time it")
    parse.add_argument("--num-classes", type=int, help="outputs that the weights must have")
    parse.add_argument("--img-size", type=int, nargs="+", metavar="N", help="side in pixels, or height and width")
    parse.add_argument("--batch", type=int, default=1, help="images a call, where not dynamic (default: %(default)s)")
    parse.add_argument(
        "--dynamic",
        nargs="?",
        const="all",
        default="none",
        choices=("batch", "all"),
        help="any batch, height and width, or any batch alone, where scans keep their loops",
    )
    parse.add_argument("--half", action="store_true", help="float16 inside; the file takes and returns float32")
    parse.add_argument("--int8", action="store_true", help="onnx and openvino: quantize convolutions and linear layers")
    parse.add_argument("--calibrate", type=Path, metavar="FOLDER", help="pictures that give --int8 its scales")
    parse.add_argument("--calibrate-most", type=int, metavar="N", help=f"of them (default: {_CALIBRATE_MOST})")
    parse.add_argument("--images", type=Path, metavar="FOLDER", help="pictures on which the likeliest class must agree")
    parse.add_argument("--images-most", type=int, metavar="N", help=f"of them (default: {_IMAGES_MOST})")
    parse.add_argument("--aot", action="store_true", help="pt2: machine code by AOTInductor, which needs no Python")
    parse.add_argument(
        "--fused",
        action="store_true",
        help="torchscript and pt2: keep the fused ops, which are fast and need `import visionmix` where the file runs",
    )
    parse.add_argument("--reparameterize", action="store_true", help="fold norms and branches first, where a model can")
    parse.add_argument("--opset", type=int, help="onnx: version of the operators (default: the exporter's)")
    return parse


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError at arguments that contradict each other or the format, before any work is done."""
    counts = {"calibrate_most": args.calibrate_most, "images_most": args.images_most, "opset": args.opset}
    check_least(1, batch=args.batch, num_classes=args.num_classes, **counts)
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 1):
        raise ValueError(f"--img-size={args.img_size} is no size; give one side, or height and width")
    if args.out.suffix not in (ends := export_files.SUFFIXES[args.format]):
        raise ValueError(f"--out={args.out} does not end in {' or '.join(ends)}, as --format {args.format} needs")
    check_out(args.out)
    if args.format == "openvino":
        check_out(args.out.with_suffix(".bin"))
    of_formats = {
        "int8": ("onnx", "openvino"),
        "fused": ("torchscript", "pt2"),
        "aot": ("pt2",),
        "opset": ("onnx", "openvino"),
    }
    for name, formats in of_formats.items():
        if getattr(args, name) and args.format not in formats:
            raise ValueError(f"--{name} is for --format {' or '.join(formats)}, not for {args.format}")
    if args.fused and args.aot:
        raise ValueError("--aot needs no Python and the fused ops are called from it; leave --fused out")
    if args.int8 != bool(args.calibrate):
        raise ValueError("--int8 and --calibrate FOLDER need each other: the folder's pictures give the scales")
    for name in ("calibrate", "images"):
        if (most := getattr(args, f"{name}_most")) and not getattr(args, name):
            raise ValueError(f"--{name}-most={most} counts the pictures of --{name} FOLDER; give that too")
    if args.int8 and args.half:
        raise ValueError("--int8 and --half exclude each other; give one")
    if args.dynamic != "none" and args.batch != 1:
        raise ValueError(f"--batch={args.batch} is for files of one batch size, --dynamic ones take any; give one")
    for name in _NEEDS.get(args.format, ()):
        export_files.library(name)


def load(args: argparse.Namespace) -> models.Trained:
    """Return the model that the arguments name, in float32 on the CPU. Raises as `models.load_trained` does."""
    device = torch.device("cpu")
    side = args.img_size[0] if args.img_size else None
    if not args.random_weights:
        return models.load_trained(
            args.checkpoint,
            name=args.model,
            pretrained=args.pretrained,
            classes=args.num_classes,
            image_size=side,
            device=device,
        )
    if not args.model:
        raise ValueError("--random-weights does not say which model; give its name")
    torch.manual_seed(0)
    model = models.create_model(args.model, **({"num_classes": args.num_classes} if args.num_classes else {})).eval()
    return models.Trained(model, args.model, None, models.model_input(model, image_size=side), None)


def metadata_of(trained: models.Trained, size: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Return what the file says of itself."""
    settings = trained.input.to_dict() | {"image_size": list(size)}
    precision = "int8" if args.int8 else "float16" if args.half else "float32"
    weights = "random" if args.random_weights else models.weights_hash(trained.model)
    about = {"model": trained.name, "classes": trained.classes, "weights_hash": weights, "precision": precision}
    made = (trained.recipe or {}).get("model", {})
    about |= {
        "kwargs": made.get("kwargs", {}),
        "reduction": made.get("reduction"),
        "outputs": trained.model.num_classes,
    }
    return about | {"dynamic": args.dynamic, "input": settings, "visionmix": version("visionmix")}


def write(args: argparse.Namespace, trained: models.Trained, size: tuple[int, int], aside: Path) -> None:
    """Write the model as the file `aside`, in the format and precision that the arguments ask for."""
    axes, metadata = export_files.DYNAMIC[args.dynamic], metadata_of(trained, size, args)
    # Of a dynamic export, sides and batch must differ, and none be 1: see `to_program`.
    height, width = (size[0], size[1] + 32 * (size[0] == size[1])) if args.dynamic == "all" else size
    example = torch.randn(2 if axes else args.batch, 3, height, width)
    halved = args.half and args.format != "openvino"  # which halves the weights itself
    module = export_files.HalfInside(copy.deepcopy(trained.model)).eval() if halved else trained.model
    if args.format == "pt2":
        options = {"fused": args.fused, "compiled": args.aot}
        export_files.to_pt2(module, example, aside, dynamic=axes, metadata=metadata, **options)
        return
    if args.format == "torchscript":
        scripted = args.fused or bool(axes)
        ops = export_files.to_torchscript(module, example, aside, scripted=scripted, metadata=metadata)
        if ops and not args.fused:
            raise ValueError(
                f"TorchScript for any size calls {', '.join(ops)} of this library; add --fused, and import visionmix "
                "where the file runs, or leave --dynamic out"
            )
        return
    with tempfile.TemporaryDirectory(prefix=".export.", dir=aside.parent.parent) as folder:
        steps = [Path(folder, "float32.onnx"), *([Path(folder, "int8.onnx")] if args.int8 else [])]
        if args.format == "onnx":
            steps[-1] = aside
        export_files.to_onnx(module, example, steps[0], dynamic=axes, opset=args.opset, metadata=metadata)
        if args.int8:
            most = args.calibrate_most or _CALIBRATE_MOST
            images = export_int8.read_images(args.calibrate, trained.input, size, most)
            export_int8.quantize(*steps, images, batch=args.batch)
        if args.format == "openvino":
            export_files.to_openvino(steps[-1], aside, half=args.half, metadata=metadata)


def check(args: argparse.Namespace, trained: models.Trained, original: nn.Module, size: tuple[int, int], file: Path):
    """Print how far the file lies from the model.

    Raises:
        ValueError: it is in float32 and lies too far, or it does not run.
    """
    run, _ = open_file(file)
    exact = not (args.half or args.int8)
    sizes = export_checks.sizes_to_check(size, args.batch, args.dynamic)
    for difference in export_checks.compare_random(run, original, sizes, exact=exact):
        print(difference, flush=True)
        if exact and not difference.relative <= difference.allowed:
            raise ValueError(
                f"the file's logits are off by {difference.relative:.1e} of the largest, more than "
                f"{difference.allowed:.1e}, for images of shape {difference.shape}; nothing was written"
            )
    folder = args.images or args.calibrate
    if folder is None:
        if not exact:
            print(_SMALL)
        return
    images = export_int8.read_images(folder, trained.input, size, args.images_most or _IMAGES_MOST)
    agreed, count = export_checks.agreement(run, original, images, args.batch)
    if count == 0:
        raise ValueError(f"{folder} has {len(images)} pictures to compare, fewer than --batch={args.batch}; give more")
    own = "" if args.images else ", some of which it was calibrated on: give others by --images"
    print(f"the likeliest class is the model's for {agreed} of {count} pictures of {folder}{own}")


def export(args: argparse.Namespace) -> None:
    """Write and check the file. Raises ValueError and OSError as `main` says them."""
    check_arguments(args)
    for folder in (args.calibrate, args.images):
        if folder is not None and len(pictures := find_items([folder])) < args.batch:
            raise ValueError(f"{folder} has {len(pictures)} pictures, fewer than --batch={args.batch}; give more")
    trained = load(args)
    size = image_sides(args.img_size if args.img_size and args.img_size[1:] else trained.input.image_size)
    models.check_input(trained.model, trained.name, size, torch.device("cpu"))
    original = trained.model
    if args.reparameterize:
        trained.model = reparameterize_model(original)
    with export_files.staged(args.out) as aside:
        write(args, trained, size, aside)
        check(args, trained, original, size, aside)
        sizes = {file.name: file.stat().st_size for file in sorted(aside.parent.iterdir())}
    print("wrote", ", ".join(f"{args.out.parent / name} ({size / 1e6:.1f} MB)" for name, size in sizes.items()))


def main(argv: list[str] | None = None) -> int:
    """Run the `export` command with these arguments."""
    args = parser().parse_args(argv)
    try:
        export(args)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

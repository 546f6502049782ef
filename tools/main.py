"""The `visionmix` command: after pip install it runs the scripts that a clone has in tools/."""

import importlib
import sys

from visionmix.registry import nearest

# Imported only when asked for: each brings much of its own.
COMMANDS = {
    "train": ("train", "train a classifier on an image folder by a recipe"),
    "validate": ("validate", "test a model on an image folder"),
    "predict": ("predict", "say what is in pictures"),
    "train-det": ("train_det", "train a detector by a config of mmdet"),
    "train-seg": ("train_seg", "train a segmentation model by a config of mmseg"),
    "draw-predictions": ("draw_predictions", "draw what a detector or segmentation model finds beside the truth"),
    "check-configs": ("check_configs", "build, train a step and run every mmdet and mmseg config"),
    "export": ("export", "write a model as ONNX, TorchScript, torch.export or OpenVINO, and check the file"),
    "convert": ("convert", "make a folder for timm and the hub of a published checkpoint"),
    "info": ("info", "parameters, operations and published figures of a model"),
    "plan": ("plan", "time, memory and GPU-hours of a training run, before it costs anything"),
    "draw-scans": ("draw_scans", "draw scan orders as pictures"),
    "bakeoff": ("bakeoff", "train one skeleton with every mixer, and compare them"),
    "reduce-curve": ("reduce_curve", "accuracy, speed and operations of a model under token reductions"),
    "draw-tokens": ("draw_tokens", "draw images with the regions that a reduced model merges"),
    "draw-attention": ("draw_attention", "draw what one cell attends to in the mixers of models"),
    "draw-receptive-field": ("draw_receptive_field", "draw which pixels models see from the middle of an image"),
    "benchmark": ("benchmark", "time and memory of whole models, side by side"),
    "draw-speed": ("draw_speed", "draw accuracy against CPU time, our models beside timm's"),
    "benchmark-kernels": ("benchmark_kernels", "time and memory of the fused ops beside their peers"),
    "benchmark-exports": ("benchmark_exports", "time of exported files beside PyTorch, on this CPU"),
    "gpu": ("gpu", "all that a person with a GPU wants to know: checks, times beside peers, models"),
    "compile-kernels": ("compile_kernels", "compile the Triton kernels ahead of time for any GPU"),
    "kernel-traffic": ("kernel_traffic", "bytes moved and operations of the Triton kernels"),
    "pack": ("pack", "pack an image folder into WebDataset shards"),
    "demo-data": ("demo_data", "make small real data sets from images that ship inside wheels"),
}


def usage() -> str:
    """Return the help text."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: visionmix COMMAND ...", "", *lines, "", "visionmix COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Run `visionmix COMMAND arguments`; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"visionmix {version('visionmix')}")
        return 0
    command = argv[0].replace("_", "-")
    if command not in COMMANDS:
        print(f"visionmix: no command {argv[0]!r}{nearest(command, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"visionmix.tools.{COMMANDS[command][0]}")
    return module.main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())

"""Training by a config of mmdet or mmseg, shared by `train_det.py` and `train_seg.py`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from visionmix.tools.recipe import find

INSTALL = "mmengine, mmcv, mmdet and mmseg are needed; run: sh tools/install_openmmlab.sh"


def installed() -> bool:
    """Return whether mmengine, mmcv, mmdet and mmseg are installed."""
    return all(find_spec(name) for name in ("mmengine", "mmcv", "mmdet", "mmseg"))


def read(name: str, data: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """Return the config (an mmengine Config) called `name`, fitted to this machine.

    Args:
        name: A path, or a packaged config's name such as "mmdet/mask_rcnn_vmamba_tiny_1x.py".
        data: Folder of the data set, in place of the config's `data_root` wherever a path begins with that.
        options: Values by dotted key, as mmengine's --cfg-options has them.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: `data` is given and the config names no data_root.
    """
    from mmengine.config import Config

    config = Config.fromfile(find(name, "py"))
    if data is not None:
        old = config.get("data_root")
        if old is None:
            raise ValueError(
                f"{name} has no data_root, so --data={data!r} has no place; set its paths by --cfg-options"
            )
        new = str(Path(data).resolve())
        _replace(config, lambda value: _moved(value, old, new))
    config.merge_from_dict(options or {})
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        # SyncBN asks for several processes, on a CPU even to run at all.
        _replace(config, lambda value: "BN" if value == "SyncBN" else value)
    if not torch.cuda.is_available():
        _replace(config, lambda value: "gloo" if value == "nccl" else value)
    return config


def _moved(value: str, old: str, new: str) -> str:
    if value == old:
        return new
    root = old.rstrip("/") + "/"
    return f"{new}/{value.removeprefix(root)}" if value.startswith(root) else value


def _replace(node: Any, change: Callable[[str], str]) -> None:
    """Change every string inside the dicts and lists of `node` in place."""
    for key, value in list(enumerate(node)) if isinstance(node, list) else list(node.items()):
        if isinstance(value, str):
            changed: Any = change(value)
            if changed != value:
                node[key] = changed
        elif isinstance(value, dict | list):
            _replace(value, change)


def train(scope: str, argv: Sequence[str] | None, text: str) -> int:
    """Run the command that trains by a config of `scope`, "mmdet" or "mmseg"; return its exit status."""
    parser = argparse.ArgumentParser(
        prog=f"visionmix train-{scope[2:]}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help=f"a path, or a packaged name such as {scope}/...py")
    parser.add_argument("--data", help="folder of the data set, in place of the config's data_root")
    parser.add_argument("--work-dir", help="folder of the results (default: output/CONFIG)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="FILE",
        help="go on from FILE, or from the work dir's last checkpoint",
    )
    # Without mmengine the command still says how it is called.
    reader: dict[str, Any] = {}
    if installed():
        from mmengine.config import DictAction

        reader = {"action": DictAction}
    parser.add_argument(
        "--cfg-options", nargs="+", metavar="KEY=VALUE", help="any key, e.g. train_dataloader.batch_size=4", **reader
    )
    args = parser.parse_args(argv)
    if not installed():
        print(f"train: {INSTALL}", file=sys.stderr)
        return 2
    from mmengine.runner import Runner

    try:
        config = read(args.config, args.data, args.cfg_options)
        if (found := config.get("default_scope")) != scope:
            raise ValueError(f"{args.config} is a config of {found}, and this command trains those of {scope}")
    except (OSError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    config.work_dir = args.work_dir or str(Path("output") / Path(args.config).stem)
    config.launcher = "pytorch" if "RANK" in os.environ else "none"
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume is True else args.resume
    Runner.from_cfg(config).train()
    return 0

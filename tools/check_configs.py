"""Build every mmdet and mmseg config here, run one training step and one inference on made-up images, report each.

    python tools/check_configs.py                    # all of them
    python tools/check_configs.py mmseg vig_h_t      # those whose name holds every word

The training step is the config's own: its optimiser, its settings by parameter, one batch of two images. The loss must
be finite and every parameter must have a gradient, since distributed training waits for all of them. For time, a second
stage sees 32 boxes of an image in place of 512, and no window is wider than the images. The exit status is 1 where any
config fails, 2 where OpenMMLab is not installed.
"""

import argparse
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from visionmix.tools import openmmlab

ROOT = Path(str(resources.files("visionmix.configs")))
SIZE = (64, 96)  # height and width of the images
BOXES = 32  # of an image, in a second stage


def configs(words: list[str]) -> list[str]:
    """Return the packaged configs whose name holds all of `words`, as names inside the package."""
    names = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("*/*.py")))
    return [name for name in names if all(word in name for word in words)]


def detection_batch(config: Any, images: list[torch.Tensor]) -> dict[str, list]:
    """Return `images` with two boxes and their masks each, as mmdet's loaders give them."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = SIZE
    samples = []
    for number in range(len(images)):
        boxes = torch.tensor([[8.0, 8.0, 40.0, 44.0], [42.0 + number, 16.0, 90.0, 60.0]])
        masks = np.zeros((2, height, width), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        sample = DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long)))
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
        shapes = {"img_shape": SIZE, "ori_shape": SIZE, "batch_input_shape": SIZE, "pad_shape": SIZE}
        sample.set_metainfo({**shapes, "scale_factor": (1.0, 1.0), "img_id": number})
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def segmentation_batch(config: Any, images: list[torch.Tensor]) -> dict[str, list]:
    """Return `images` with a class per pixel, as mmseg's loaders give them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = config.model.decode_head.num_classes
    samples = []
    for _ in images:
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(classes, (1, *SIZE))))
        sample.set_metainfo({"img_shape": SIZE, "ori_shape": SIZE, "pad_shape": SIZE})
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def see_fewer_boxes(model: Any) -> None:
    """Let the second stage of a detector's config, if it has one, train and predict on `BOXES` boxes of an image."""
    stages = model.get("train_cfg", {}).get("rcnn") or []
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = BOXES
    for part in ("train_cfg.rpn_proposal", "test_cfg.rpn"):
        section, key = part.split(".")
        if proposals := model.get(section, {}).get(key):
            proposals.max_per_img = BOXES


def see_narrow_windows(backbone: Any) -> None:
    """Let the windows of a backbone's last two stages, if its config has them, be as wide as the images at most."""
    if windows := backbone.get("window_sizes"):
        backbone.window_sizes = [min(side, max(SIZE) // cell) for side, cell in zip(windows, (16, 32), strict=True)]


BATCHES = {"mmdet": detection_batch, "mmseg": segmentation_batch}


def check(name: str) -> str:
    """Build the config `name`, train it for one step, run it once; return a line on parameters, loss and output.

    Raises:
        ValueError: the loss is not finite, or parameters have no gradient.
        Exception: any other error of OpenMMLab or of the model.
    """
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    MMLogger.get_instance("check_configs", log_level="WARNING")  # else the optimiser lists every parameter
    # Else the weights would be downloaded.
    config = openmmlab.read(name, options={"model.backbone.pretrained": False})
    if config.model.data_preprocessor.get("size"):
        config.model.data_preprocessor.size = SIZE
    config.model.data_preprocessor.pop("batch_augments", None)  # which pad images to their full size
    see_fewer_boxes(config.model)
    see_narrow_windows(config.model.backbone)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    make = BATCHES[config.default_scope]
    images = [torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in range(2)]
    missing = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter_name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, reached=parameter_name: missing.discard(reached))
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    losses = model.train().train_step(make(config, images), optim_wrapper=optimizer)
    if not torch.isfinite(losses["loss"]):
        raise ValueError(f"the loss is {losses['loss']}")
    if missing:
        raise ValueError(f"{len(missing)} parameters had no gradient, {min(missing)} for one")
    with torch.no_grad():
        (found,) = model.eval().test_step(make(config, images[:1]))
    if config.default_scope == "mmdet":
        seen = f"{len(found.pred_instances)} boxes"
    else:
        seen = "a map of {}x{}".format(*found.pred_sem_seg.data.shape[-2:])
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{parameters:.1f} M parameters, loss {losses['loss'].item():.2f}, {seen}"


def main(argv: list[str] | None = None) -> int:
    """Run the `check-configs` command with these arguments."""
    parser = argparse.ArgumentParser(
        prog="visionmix check-configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="check only the configs whose name holds all of these")
    args = parser.parse_args(argv)
    if not openmmlab.installed():
        print(f"check_configs: {openmmlab.INSTALL}", file=sys.stderr)
        return 2
    names = configs(args.words)
    if not names:
        print(f"check_configs: no config's name holds all of {args.words}", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        start = time.perf_counter()
        try:
            seen = check(name)
        except Exception as error:  # so that every config is reported
            failed += 1
            seen = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name:<44}{time.perf_counter() - start:5.1f} s  {seen}", flush=True)
    print(f"{len(names) - failed} of {len(names)} configs build, train a step and predict")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Faster R-CNN and RetinaNet of torchvision on a visionmix pyramid: a training step and a prediction each.

python examples/torchvision_detection.py                                      # a tiny model, random images
python examples/torchvision_detection.py --model vmamba_tiny --pretrained --size 800 --channels 256
"""

import argparse
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

import visionmix  # noqa: F401  registers the models with timm


class Pyramid(nn.Module):
    """The chosen stages of a model, then an FPN: images to maps of `out_channels`, as torchvision's detectors ask."""

    def __init__(self, name: str, stages: list[int], out_channels: int, extra_blocks: nn.Module, **options) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=stages, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), each) for level, each in enumerate(self.body(x))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_vmamba", help="a model of four stages")
    parser.add_argument("--pretrained", action="store_true", help="begin with the published weights of the backbone")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--channels", type=int, default=32, help="width of the FPN; 256 in published detectors")
    args = parser.parse_args()
    torch.manual_seed(0)

    def backbone(stages: list[int], extra_blocks: nn.Module) -> Pyramid:
        return Pyramid(args.model, stages, args.channels, extra_blocks, pretrained=args.pretrained)

    sizes = {"num_classes": 4, "min_size": args.size, "max_size": 2 * args.size}  # class 0 is the background
    models = [
        FasterRCNN(backbone([0, 1, 2, 3], LastLevelMaxPool()), **sizes),
        RetinaNet(backbone([1, 2, 3], LastLevelP6P7(args.channels, args.channels)), **sizes),
    ]
    images = [torch.rand(3, args.size, args.size), torch.rand(3, args.size, args.size + 20)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    for model in models:
        losses = model.train()(images, targets)
        sum(losses.values()).backward()
        with torch.no_grad():
            found = model.eval()(images)
        print(f"{type(model).__name__} on {args.model}: {', '.join(losses)}; {len(found[0]['boxes'])} boxes")


if __name__ == "__main__":
    main()

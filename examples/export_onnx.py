"""Write a model as ONNX with any batch and image size, and classify a picture with ONNX Runtime alone.

python examples/export_onnx.py                                                      # a tiny model, random weights
python examples/export_onnx.py --model vig_s --checkpoint vig_s.pth --image cat.jpg --out vig_s.onnx

`visionmix export` does the same with checks, half precision, int8 and other formats.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image

import visionmix


def classify(path: str | Path, image: Image.Image, side: int, mean: tuple, std: tuple) -> np.ndarray:
    """Return the logits of one picture: a machine that only runs this function needs no PyTorch."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="test_van")
    parser.add_argument("--checkpoint", help="weights, as published or from visionmix train; random ones without it")
    parser.add_argument("--image", help="picture to classify; noise without it")
    parser.add_argument("--out", help="file to write; a temporary one without it")
    args = parser.parse_args()

    weights = {"pretrained": True, "pretrained_cfg_overlay": {"file": args.checkpoint}} if args.checkpoint else {}
    model = timm.create_model(args.model, **weights).eval()
    cfg = model.pretrained_cfg
    with tempfile.TemporaryDirectory() as scratch:
        path = args.out or f"{scratch}/model.onnx"
        # Two images of unequal sides: torch.export takes a length of 1, and lengths that are equal, for constants.
        # Under the reference, ops of this library are exported in PyTorch's own operators.
        axes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        example = torch.randn(2, 3, cfg["input_size"][1], cfg["input_size"][2] + 32)
        with visionmix.kernels.use("reference"), torch.no_grad():
            torch.onnx.export(model, (example,), path, input_names=["images"], dynamic_shapes=(axes,), verbose=False)

        noise = Image.effect_noise((300, 200), 80)
        image = Image.open(args.image) if args.image else noise
        for side in (cfg["input_size"][1], cfg["input_size"][1] + 32):
            logits = classify(path, image, side, cfg["mean"], cfg["std"])
            print(f"{side} pixels: class {logits.argmax()}, logit {logits.max():.3f}")


if __name__ == "__main__":
    main()

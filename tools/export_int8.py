"""ONNX files in int8, by ONNX Runtime's static quantization, and the images that it is calibrated on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from visionmix.tools import models
from visionmix.tools.export_files import INPUT, library
from visionmix.tools.items import ItemSet, find_items
from visionmix.tools.transforms import eval_transform

_OPS = ["Conv", "Gemm", "MatMul"]


def read_images(folder: Path, settings: models.Input, size: tuple[int, int], most: int) -> list[Tensor]:
    """Return up to `most` pictures of a folder, spread evenly over it, as the model takes them.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        ValueError: none of them can be read.
    """
    items = find_items([folder])
    transform = eval_transform(size, settings.interpolation, settings.crop_pct, settings.normalise, settings.crop_mode)
    step = max(1, len(items) // most)
    images = [image for _, image, _ in ItemSet(items[::step][:most], transform) if image is not None]
    if not images:
        raise ValueError(f"{folder}: none of its pictures can be read")
    return images


class _Reader:
    """Images one batch a call, as ONNX Runtime asks for them."""

    def __init__(self, images: list[Tensor], batch: int) -> None:
        self.batches: Iterator[Tensor] = iter(
            [torch.stack(images[at : at + batch]) for at in range(0, len(images) - batch + 1, batch)]
        )

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def quantize(path: Path, out: Path, images: list[Tensor], batch: int = 1) -> None:
    """Write an ONNX file with weights and activations of convolutions and linear layers in int8.

    A scale a channel for weights, one a tensor for activations, from the smallest and largest value that the images
    give. Weights keep to half of int8's range, -64 to 64: x86 CPUs without VNNI add two products in 16 bits, where
    larger weights would saturate, so that the file would classify otherwise than on other CPUs. Products of two
    activations, such as attention's, and all else stay in float32. The file has ONNX's QuantizeLinear and
    DequantizeLinear, which ONNX Runtime, OpenVINO and TensorRT read.

    Args:
        path: of the file in float32.
        out: of the new file.
        images: (channels, height, width) each, at the size of the export.
        batch: of images that the file takes.

    Raises:
        ValueError: onnxruntime is not installed, the weights lie beside the file, or there are fewer images than
            `batch`.
    """
    if path.with_name(f"{path.name}.data").exists():
        raise ValueError(
            "--int8 takes models whose weights fit into one ONNX file, of 2 GB; leave it out, or try --half"
        )
    if len(images) < batch:
        raise ValueError(f"--calibrate has {len(images)} images, fewer than --batch={batch}; give more, or --batch 1")
    quantization = library("onnxruntime.quantization")
    prepared = path.with_name("prepared.onnx")
    # Folds norms into convolutions, and gives every tensor a shape.
    quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        out,
        _Reader(images, batch),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=_OPS,
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    prepared.unlink()

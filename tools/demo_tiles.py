"""Tiles of annotated images: trees from the air for detection, cell nuclei under a microscope for segmentation.

Part of each image is set aside for testing, behind a margin, before either part is cut into tiles. So no test tile
shares a pixel with a train tile or touches one. A tree belongs to the tile that holds the centre of its box.
"""

import io
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from visionmix.tools.arguments import check_least
from visionmix.tools.images import read_rgb
from visionmix.tools.wheel_data import Wheel, make_folder, read_members

# Aerial photographs of NEON's sites at Yellowstone, Ordway-Swisher and Soaproot Saddle, with a box around every tree.
TREES = Wheel("deepforest==2.1.0", "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54")
PHOTOGRAPHS = (
    "2019_YELL_2_528000_4978000_image_crop2",
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)
# A fluorescence micrograph with a mask for each of its 125 nuclei.
NUCLEI = Wheel("stardist==0.9.2", "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023")
HELD_OUT = 0.3  # of a photograph's height


class Box(NamedTuple):
    """A rectangle in pixels of its image; right and bottom are the first column and row outside."""

    left: float
    top: float
    right: float
    bottom: float


class Part(NamedTuple):
    """A region of an image that is cut into tiles."""

    split: str
    region: Box


def parts(width: int, height: int, tile: int, margin: int) -> list[Part]:
    """Return the train and test regions of an image; one too low for test tiles of half a side is all for training."""
    border = round(height * (1 - HELD_OUT))
    if height - border < tile // 2:
        return [Part("train", Box(0, 0, width, height))]
    return [Part("train", Box(0, 0, width, border - margin)), Part("val", Box(0, border, width, height))]


def tiles(region: Box, tile: int) -> Iterator[Box]:
    """Yield the tiles of a region, row by row; a remainder at its right or lower edge is kept from half a tile on."""

    def spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
        for first in range(start, stop - tile // 2 + 1, tile):
            yield first, min(first + tile, stop)

    left, top, right, bottom = (int(side) for side in region)
    for upper, lower in spans(top, bottom):
        for first, last in spans(left, right):
            yield Box(first, upper, last, lower)


def boxes_in(tile: Box, boxes: list[Box]) -> list[Box]:
    """Return, in the tile's own pixels and cut at its edges, the boxes whose centre it holds."""
    inside = []
    for box in boxes:
        x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        if tile.left <= x < tile.right and tile.top <= y < tile.bottom:
            inside.append(
                Box(
                    max(box.left, tile.left) - tile.left,
                    max(box.top, tile.top) - tile.top,
                    min(box.right, tile.right) - tile.left,
                    min(box.bottom, tile.bottom) - tile.top,
                )
            )
    return inside


def read_boxes(xml: bytes) -> list[Box]:
    """Return the boxes of an annotation in Pascal VOC's format, of all classes."""
    found = ElementTree.fromstring(xml).iter("bndbox")
    return [Box(*(float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))) for box in found]


def make_trees(out: Path, *, tile: int = 256, margin: int = 64) -> Path:
    """Write a COCO detection set with one class, "tree", to `out`: images/, train.json and val.json.

    Args:
        out: The folder to make.
        tile: Side of a tile in pixels.
        margin: Pixels left out between the train and the test region.

    Raises:
        ValueError: an argument is out of range.
        OSError: the images cannot be downloaded, or `out` holds something else.
    """
    check_least(64, tile=tile)
    check_least(0, margin=margin)

    def fill(folder: Path) -> dict:
        names = [f"deepforest/data/{name}.{ending}" for name in PHOTOGRAPHS for ending in ("png", "xml")]
        files = read_members(TREES, names)
        (folder / "images").mkdir()
        sets: dict[str, dict[str, list]] = {split: {"images": [], "annotations": []} for split in ("train", "val")}
        for name in PHOTOGRAPHS:
            photograph = read_rgb(io.BytesIO(files[f"deepforest/data/{name}.png"]))
            boxes = read_boxes(files[f"deepforest/data/{name}.xml"])
            for split, region in parts(*photograph.size, tile, margin):
                for place in tiles(region, tile):
                    _add_tile(
                        sets[split], folder / "images", f"{name}_{place.top}_{place.left}", photograph, place, boxes
                    )
        for split, content in sets.items():
            content["categories"] = [{"id": 1, "name": "tree"}]
            (folder / f"{split}.json").write_text(json.dumps(content))
        return {split: len(content["images"]) for split, content in sets.items()}

    return make_folder(out, {"tile": tile, "margin": margin, "wheel": TREES.requirement}, fill)


def _add_tile(content: dict, folder: Path, name: str, photograph: Image.Image, place: Box, boxes: list[Box]) -> None:
    photograph.crop(place).save(folder / f"{name}.png")
    number = len(content["images"])
    width, height = int(place.right - place.left), int(place.bottom - place.top)
    content["images"].append({"id": number, "file_name": f"{name}.png", "width": width, "height": height})
    for box in boxes_in(place, boxes):
        size = [box.right - box.left, box.bottom - box.top]
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,  # pycocotools takes 0 for "no match"
                "image_id": number,
                "category_id": 1,
                "bbox": [box.left, box.top, *size],
                "area": size[0] * size[1],
                "iscrowd": 0,
            }
        )


def make_nuclei(out: Path, *, tile: int = 128, margin: int = 32) -> Path:
    """Write a segmentation set, 0 background and 1 nucleus, to `out`: images/SPLIT/*.png and masks/SPLIT/*.png.

    Brightness is the square root of the counts, from the lowest to the 99.8th percentile of the train region, since
    the nuclei differ in it by a factor of ten.

    Arguments and errors are those of `make_trees`.
    """
    check_least(32, tile=tile)
    check_least(0, margin=margin)

    def fill(folder: Path) -> dict:
        names = [f"stardist/data/images/{name}2d.tif" for name in ("img", "mask")]
        counts, mask = (
            np.asarray(Image.open(io.BytesIO(content))).astype(np.float64)
            for content in read_members(NUCLEI, names).values()
        )
        regions = parts(counts.shape[1], counts.shape[0], tile, margin)
        train = counts[: int(regions[0].region.bottom)]
        low, high = train.min(), np.percentile(train, 99.8)
        grey = Image.fromarray((np.sqrt(np.clip((counts - low) / (high - low), 0, 1)) * 255).round().astype(np.uint8))
        labels = Image.fromarray((mask > 0).astype(np.uint8))
        made = {}
        for split, region in regions:
            for kind, image in (("images", grey), ("masks", labels)):
                (folder / kind / split).mkdir(parents=True)
                for place in tiles(region, tile):
                    image.crop(place).save(folder / kind / split / f"{place.top}_{place.left}.png")
            made[split] = len(list(tiles(region, tile)))
        return made

    return make_folder(out, {"tile": tile, "margin": margin, "wheel": NUCLEI.requirement}, fill)

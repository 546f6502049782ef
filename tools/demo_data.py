"""Make small real data sets from images that ship inside wheels.

`photos` makes a class of each photograph in the installed scikit-image. Three square blocks of a photograph, each two
patches wide, are set aside. Test patches lie inside the blocks and train patches at least one patch away from them, so
no train patch shares a pixel with a test patch or touches one. The result is an ordinary image folder:
OUT/train/CLASS/*.png and OUT/val/CLASS/*.png. `detection` and `segmentation` cut tiles (`demo_tiles.py`) from images in
two wheels, which are downloaded once into the user's cache.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from visionmix.tools.arguments import check_least
from visionmix.tools.demo_tiles import make_nuclei, make_trees
from visionmix.tools.images import read_rgb
from visionmix.tools.wheel_data import MANIFEST, make_folder

# The colour photographs and the surface textures of skimage.data that its wheel itself carries.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}


@dataclass(frozen=True)
class Patch:
    """One square patch: the photograph's class, its split, and its corner in pixels of the resized photo."""

    split: str
    label: str
    left: int
    top: int
    size: int


def photograph_folder() -> Path:
    """Return the folder of images inside the installed scikit-image, without importing it.

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
        FileNotFoundError: its wheel lacks one of the photographs.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the demo's photographs come inside scikit-image; run: pip install scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name in PHOTOGRAPHS.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; run: pip install 'scikit-image>=0.25'")
    return folder


def open_photograph(path: Path, side: int = 640) -> Image.Image:
    """Return the photograph in RGB, resized so that its shorter side is `side` pixels."""
    image = read_rgb(path)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


# Centres of the test blocks, as fractions of width and height.
BLOCKS = ((0.25, 0.3), (0.75, 0.35), (0.5, 0.75))


def test_corners(width: int, height: int, patch: int) -> np.ndarray:
    """Return the (left, top) corner of each test block, 2 * patch pixels wide: int64 (blocks, 2).

    Raises:
        ValueError: the photograph is too small to leave room for train patches.
    """
    if min(width, height) < 6 * patch:
        raise ValueError(f"patch={patch} does not fit a photograph of {width}x{height}; it needs {6 * patch} each way")
    return np.array([[round(x * width) - patch, round(y * height) - patch] for x, y in BLOCKS])


def draw_patches(
    image: Image.Image, label: str, *, patch: int, train: int, val: int, seed: int
) -> Iterator[tuple[Patch, Image.Image]]:
    """Yield `train` + `val` patches at random places of their region, each with its pixels.

    Nearly uniform places, whose grey levels have a standard deviation under 4 of 255, are passed over: the black around
    a retina and a blank sky look the same in every photograph.

    Raises:
        ValueError: a region has no structured place left after 200 tries for a patch.
    """
    rng = np.random.default_rng([seed, zlib.crc32(label.encode())])
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    blocks = test_corners(image.width, image.height, patch)
    for split, count in (("train", train), ("val", val)):
        for _ in range(count):
            for _ in range(200):
                if split == "val":
                    left, top = (int(v) for v in blocks[rng.integers(len(blocks))] + rng.integers(0, patch + 1, 2))
                    fits = True
                else:
                    left, top = int(rng.integers(image.width - patch + 1)), int(rng.integers(image.height - patch + 1))
                    # From a block's corner, two patches of test, one of margin; a patch and a margin before it.
                    offset = np.array([left, top]) - blocks
                    fits = not ((offset > -2 * patch) & (offset < 3 * patch)).all(1).any()
                if fits and grey[top : top + patch, left : left + patch].std() >= 4:
                    break
            else:
                raise ValueError(f"the {split} region of {label!r} has no structured patch of {patch} pixels")
            yield Patch(split, label, left, top, patch), image.crop((left, top, left + patch, top + patch))


def make_photos(out: Path, *, patch: int = 48, train: int = 240, val: int = 60, seed: int = 0) -> Path:
    """Write the ImageFolder tree of photograph patches to `out`, whole or not at all, and return `out`.

    Args:
        out: the folder to make.
        patch: side of a patch in pixels.
        train: train patches per class.
        val: test patches per class.
        seed: of the patches' places.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `out` holds something else.
    """
    check_least(8, patch=patch)
    check_least(1, train=train, val=val)
    settings = {"patch": patch, "train": train, "val": val, "seed": seed, "classes": sorted(PHOTOGRAPHS)}

    def fill(aside: Path) -> dict:
        folder = photograph_folder()
        patches: list[Patch] = []
        for label, file in PHOTOGRAPHS.items():
            image = open_photograph(folder / file)
            for split in ("train", "val"):
                (aside / split / label).mkdir(parents=True)
            for place, pixels in draw_patches(image, label, patch=patch, train=train, val=val, seed=seed):
                pixels.save(aside / place.split / label / f"{len(patches):05d}.png")
                patches.append(place)
        return {"patches": [asdict(each) for each in patches]}

    return make_folder(out, settings, fill)


def _photos(args: argparse.Namespace) -> str:
    out = make_photos(args.out, patch=args.patch, train=args.train, val=args.val, seed=args.seed)
    classes = len(PHOTOGRAPHS)
    return f"{out}: {classes} photographs, {classes * args.train} train and {classes * args.val} test patches"


def _tiles(args: argparse.Namespace) -> str:
    out = args.make(args.out, tile=args.tile, margin=args.margin)
    made = json.loads((out / MANIFEST).read_text())
    return f"{out}: {made['train']} train and {made['val']} test tiles of {args.tile} pixels"


def main(argv: list[str] | None = None) -> int:
    """Run `demo_data.py photos | detection | segmentation --out DIR`."""
    parser = argparse.ArgumentParser(prog="visionmix demo-data", description=__doc__.splitlines()[0])
    sets = parser.add_subparsers(dest="set", required=True)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], str], out: str) -> argparse.ArgumentParser:
        one = sets.add_parser(name, help=text)
        one.set_defaults(run=run)
        one.add_argument("--out", type=Path, default=Path(out), help="folder to make (default: %(default)s)")
        return one

    photos = add("photos", "classification: patches of photographs, one class a photograph", _photos, "data/photos")
    photos.add_argument("--patch", type=int, default=48, help="side of a patch in pixels (default: %(default)s)")
    photos.add_argument("--train", type=int, default=240, help="train patches per class (default: %(default)s)")
    photos.add_argument("--val", type=int, default=60, help="test patches per class (default: %(default)s)")
    photos.add_argument("--seed", type=int, default=0, help="of the patches' places (default: %(default)s)")
    for name, text, make, out, tile in (
        ("detection", "COCO: trees in aerial photographs", make_trees, "data/trees", 256),
        ("segmentation", "mmseg: nuclei in a micrograph", make_nuclei, "data/nuclei", 128),
    ):
        one = add(name, text, _tiles, out)
        one.set_defaults(make=make)
        one.add_argument("--tile", type=int, default=tile, help="side of a tile in pixels (default: %(default)s)")
        one.add_argument(
            "--margin", type=int, default=tile // 4, help="pixels between train and test (default: %(default)s)"
        )
    args = parser.parse_args(argv)
    try:
        print(args.run(args))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"demo_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

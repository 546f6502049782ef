"""The photograph patches: no leak between train and test, repeatable, all or nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from visionmix.tools import data, demo_data

FEW = {"train": 5, "val": 4}


def test_a_patch_of_margin_lies_between_train_and_test(tmp_path):
    out = demo_data.make_photos(tmp_path / "photos", train=40, val=30)
    patches = [demo_data.Patch(**p) for p in json.loads((out / demo_data.MANIFEST).read_text())["patches"]]
    folder = demo_data.photograph_folder()
    for label, file in demo_data.PHOTOGRAPHS.items():
        photo = demo_data.open_photograph(folder / file)
        train = [p for p in patches if p.label == label and p.split == "train"]
        test = [p for p in patches if p.label == label and p.split == "val"]
        assert (len(train), len(test)) == (40, 30)
        for p in train + test:
            assert 0 <= p.left <= photo.width - p.size
            assert 0 <= p.top <= photo.height - p.size
        gaps = [max(abs(a.top - b.top), abs(a.left - b.left)) - 48 for a in train for b in test]
        assert min(gaps) >= 48


def test_patches_have_the_pixels_of_the_photographs(tmp_path):
    out = demo_data.make_photos(tmp_path / "photos", **FEW)
    patches = json.loads((out / demo_data.MANIFEST).read_text())["patches"]
    for number in (0, 17, len(patches) - 1):
        p = demo_data.Patch(**patches[number])
        photo = demo_data.open_photograph(demo_data.photograph_folder() / demo_data.PHOTOGRAPHS[p.label])
        expected = photo.crop((p.left, p.top, p.left + p.size, p.top + p.size))
        with Image.open(out / p.split / p.label / f"{number:05d}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_make_photos_writes_an_image_folder_and_repeats_it(tmp_path):
    first = demo_data.make_photos(tmp_path / "a", **FEW)
    second = demo_data.make_photos(tmp_path / "b", **FEW)
    assert data.check_folders(first) == sorted(demo_data.PHOTOGRAPHS)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 11 * 9 + 1
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    other = demo_data.make_photos(tmp_path / "c", seed=1, **FEW)
    assert any((first / name).read_bytes() != (other / name).read_bytes() for name in files)


def test_make_photos_keeps_a_finished_folder_and_refuses_another(tmp_path, capsys):
    out = tmp_path / "photos"
    demo_data.make_photos(out, **FEW)
    stamp = (out / demo_data.MANIFEST).stat().st_mtime_ns
    demo_data.make_photos(out, **FEW)
    assert (out / demo_data.MANIFEST).stat().st_mtime_ns == stamp
    assert demo_data.main(["photos", "--out", str(out), "--train", "6", "--val", "4"]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_make_photos_leaves_nothing_when_interrupted(tmp_path, monkeypatch):
    saved = Image.Image.save

    def stop(self, path, *args, **kwargs):
        if path.name == "00020.png":
            raise KeyboardInterrupt
        saved(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        demo_data.make_photos(tmp_path / "photos", **FEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argument", "value"), [("patch", 4), ("patch", 200), ("train", 0), ("val", -1)])
def test_make_photos_refuses_numbers_out_of_range(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        demo_data.make_photos(tmp_path / "photos", **{argument: value})
    assert not (tmp_path / "photos").exists()

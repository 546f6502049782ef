"""Packing an image folder: the images' own bytes, twice the same, whole or not there, and read by webdataset."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from visionmix.tools import data, main, pack, shards
from visionmix.tools.recipe_keys import DataRecipe

webdataset = pytest.importorskip("webdataset")

CLASSES = ["blue", "green", "red"]


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def packed(tree, tmp_path):
    pack.pack(tree, tmp_path / "packed")
    return tmp_path / "packed"


def test_the_command_packs_and_says_what(tree, tmp_path, capsys):
    assert main.main(["pack", str(tree), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out/train: 18 images of 3 classes in 1 shard(s), ")
    assert lines[1].startswith(f"{tmp_path}/out/val: 9 images of 3 classes in 1 shard(s), ")


def test_each_image_is_in_the_shards_once_byte_for_byte(tree, packed):
    for split in ("train", "val"):
        index = json.loads((packed / split / "index.json").read_text())
        stored = {}
        for entry in index["shards"]:
            content = (packed / split / entry["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
            for offset, size, target in zip(entry["offsets"], entry["sizes"], entry["targets"], strict=True):
                image = content[offset : offset + size]
                assert image not in stored
                stored[image] = target
        files = {path.read_bytes(): CLASSES.index(path.parent.name) for path in (tree / split).rglob("*.jpg")}
        assert stored == files
        assert (index["classes"], index["samples"], index["counts"]) == (CLASSES, len(files), [len(files) // 3] * 3)


def test_webdataset_itself_reads_them(tree, packed):
    files = str(packed / "train" / "train-000000.tar")
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len(samples) == 18
    for sample in samples:
        assert sample["jpg"] == (tree / "train" / f"{sample['__key__']}.jpg").read_bytes()
        assert CLASSES[int(sample["cls"])] == sample["__key__"].split("/")[0]
    assert [sample["__key__"] for sample in samples] != sorted(sample["__key__"] for sample in samples)


def test_two_calls_give_the_same_bytes(tree, packed, tmp_path):
    for path in tree.rglob("*.jpg"):
        path.touch()  # the hour does not matter
    pack.pack(tree, tmp_path / "again")
    assert listing(tmp_path / "again") == listing(packed)


def test_shards_are_cut_by_size(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_MEGABYTE", 4000)
    pack.pack(tree, tmp_path / "small", shard_size=1)
    index = json.loads((tmp_path / "small" / "train" / "index.json").read_text())
    assert len(index["shards"]) > 2
    assert sum(entry["samples"] for entry in index["shards"]) == 18
    sums = [sum(entry["sizes"]) for entry in index["shards"]]
    assert max(sums) <= 4000
    firsts = [entry["sizes"][0] for entry in index["shards"]]
    assert all(total + following > 4000 for total, following in zip(sums, firsts[1:], strict=False))
    assert list(pack.cut([5, 1, 9, 1, 1], 4)) == [range(0, 1), range(1, 2), range(2, 3), range(3, 5)]


def test_names_that_webdataset_would_cut_or_confuse(tree, tmp_path):
    content = (tree / "train" / "red" / "0.jpg").read_bytes()
    for number, name in enumerate(["a.1.jpg", "a.2.jpg", "a_1.jpg", "0.jpeg", "x" * 150 + ".jpg", "deep/0.jpg"]):
        path = tree / "train" / "red" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content + bytes([number]))
    pack.pack(tree, tmp_path / "odd")
    files = str(tmp_path / "odd" / "train" / "train-000000.tar")
    samples = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 18 + 6
    assert len(data.open_split(DataRecipe(path=str(tmp_path / "odd")), "train", CLASSES)) == 24


def test_bad_input_is_refused_before_anything_is_written(tree, tmp_path, capsys):
    def refused(*arguments, words):
        assert main.main(["pack", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err

    out = tmp_path / "out"
    refused(tmp_path / "nowhere", out, words="nowhere does not exist")
    refused(tree / "train", out, words="has no train/ folder")
    refused(tree, tree / "packed", words="lies in the image folder")
    refused(tree, tree, words="lies in the image folder")
    refused(tree, out, "--shard-size", "0", words="shard_size=0 is too small")
    (tree / "val" / "red").rename(tree / "val" / "white")
    refused(tree, out, words="only in val/: white")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    (tree / "val" / "white").rename(tree / "val" / "red")
    refused(tree, out, words="is no empty folder")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_whole_shards_and_no_index(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_MEGABYTE", 4000)
    read, seen = Path.read_bytes, []

    def fail(path):
        seen.append(path)
        if len(seen) == 12:
            raise OSError(28, "No space left on device")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match=r"could not write .*train-00000\d.tar.*make room"):
            pack.pack(tree, tmp_path / "out", shard_size=1)
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left
    assert left == [f"train-{number:06d}.tar" for number in range(len(left))]
    for name in left:
        assert shards.scan(tmp_path / "out" / "train" / name)[1] == []
    with pytest.raises(ValueError, match=r"has no index.json, as visionmix pack writes it once all shards are whole"):
        data.open_split(DataRecipe(path=str(tmp_path / "out")), "train", CLASSES)


@pytest.mark.parametrize("place", [512, 1100, 1700], ids=["class", "header", "image"])
def test_a_disk_that_gives_back_other_bytes_is_found_out(tree, tmp_path, monkeypatch, place):
    class Faulty(webdataset.TarWriter):
        def close(self):
            super().close()
            self.stream.seek(place)
            self.stream.write(b"\xff\xfe\xfd")

    monkeypatch.setattr(webdataset, "TarWriter", Faulty)
    with pytest.raises(OSError, match="the disk or memory is at fault"):
        pack.pack(tree, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar*"))


def test_damaged_images_are_packed_as_they_are(tree, cut, tmp_path):
    cut(tree / "train" / "red" / "2.jpg")
    pack.pack(tree, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as archive:
        assert archive.extractfile("red/2.jpg").read() == (tree / "train" / "red" / "2.jpg").read_bytes()

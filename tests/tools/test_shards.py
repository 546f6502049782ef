"""Shards: found by folder or pattern, each image once, the same images as the folder's, resumed, damage passed over."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from small_runs import last_of

from visionmix.tools import data, pack, recipe, shards, train
from visionmix.tools.recipe_keys import DataRecipe

webdataset = pytest.importorskip("webdataset")

CLASSES = ["blue", "green", "red"]
NORMALISE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
STILL = data.eval_transform(32, "bicubic", 1.0, NORMALISE)


@pytest.fixture
def packed(tree, tmp_path, monkeypatch):
    """Several small shards a split, of the images in `tree`."""
    monkeypatch.setattr(pack, "_MEGABYTE", 4000)
    pack.pack(tree, tmp_path / "packed", shard_size=1)
    assert len(list((tmp_path / "packed" / "train").glob("*.tar"))) > 2
    return tmp_path / "packed"


def split_of(path, split="train", classes=CLASSES, **options):
    given = {name: options.pop(name) for name in ("train", "val", "classes_given") if name in options}
    wanted = DataRecipe(path=str(path), classes=given.pop("classes_given", None), **given)
    return data.open_split(wanted, split, classes, options.pop("transform", STILL), **options)


def loaded(images):
    return sorted((image.tobytes(), target) for image, target in map(images.load, range(len(images))))


def write(path, samples):
    """Write a shard of [(name, content), ...] as another program does, without an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_hold_the_images_and_classes_of_the_folder(tree, packed):
    assert data.check_data(DataRecipe(path=str(packed))) == CLASSES
    for split in ("train", "val"):
        assert loaded(split_of(packed, split)) == loaded(split_of(tree, split))
    outputs = split_of(packed, "val", outputs=[7, 2, 7])
    assert sorted(set(outputs.targets.tolist())) == [2, 7]
    with pytest.raises(ValueError, match="classes that the model does not know: red"):
        split_of(packed, classes=["blue", "green"])


def test_an_archive_left_in_an_image_folder_does_not_make_it_shards(tree, packed):
    for place in (tree, tree / "train"):
        (place / "ILSVRC2012.tar").write_bytes(b"")
    assert not shards.has_shards(str(tree))
    assert data.check_data(DataRecipe(path=str(tree))) == CLASSES
    assert shards.has_shards(str(packed))
    assert shards.has_shards(str(packed / "train"))
    assert shards.has_shards(f"{packed}/train/train-{{000000..000001}}.tar")


def test_each_way_to_say_where_shards_are(packed, tmp_path):
    count = len(list((packed / "train").glob("*.tar")))
    numbers = f"{{000000..{count - 1:06d}}}"
    pattern = f"{packed}/train/train-{numbers}.tar"
    assert shards.expand(pattern) == sorted(map(str, (packed / "train").glob("*.tar")))
    assert len(split_of(pattern)) == 18
    both = f"{packed}/{{train/train,val/val}}-000000.tar"
    assert {Path(file).name for file in split_of(both, "val").files} == {"val-000000.tar"}
    assert {Path(file).name for file in split_of(both).files} == {"train-000000.tar"}
    assert len(split_of(packed, train=f"train/train-{numbers}.tar")) == 18
    assert len(split_of(packed, train="val")) == 9
    assert len(split_of(packed, "val", val=pattern)) == 18
    flat = tmp_path / "flat"
    flat.mkdir()
    for split, name in (("train", "photos-train-"), ("val", "photos-validation-")):
        for file in (packed / split).glob("*.tar"):
            file.rename(flat / file.name.replace(f"{split}-", name))
    assert len(split_of(flat, classes=["0", "1", "2"], classes_given=3)) == 18
    assert len(split_of(flat, "val", classes=["0", "1", "2"], classes_given=3)) == 9
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 shards of .*do not exist"):
        split_of(f"{flat}/photos-train-{{000000,999999}}.tar")
    with pytest.raises(FileNotFoundError, match=r"has no shards of val; name it in data.val"):
        split_of(f"{flat}/photos-train-000000.tar", "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_see_each_image_once(packed, workers):
    images = split_of(packed)
    names = {sample.image.numpy().tobytes() for sample in map(images.__getitem__, ((0, i) for i in range(18)))}
    assert len(names) == 18
    seen = []
    for rank in range(2):
        loader = data.make_loader(images, batch=3, workers=workers, shuffle=True, rank=rank, world=2)
        loader.sampler.set_epoch(1)
        seen += [image.numpy().tobytes() for batch in loader for image in batch.images]
    assert len(seen) == 18
    assert set(seen) == names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_in_mid_epoch_to_the_bit(packed, workers):
    made = recipe.from_dict({"data": {"image_size": 16}, "augment": {"erase_prob": 0.5}}, "test")

    def loader(workers):
        images = split_of(packed, transform=data.train_transform(made, NORMALISE), seed=3, replace=True)
        return data.make_loader(images, batch=2, workers=workers, shuffle=True, seed=3)

    def rest(loader, count=None):
        loader.sampler.set_epoch(2)
        batches = []
        for batch in loader:
            batches.append((batch.images, batch.targets.tolist()))
            if len(batches) == count:
                break
        return batches

    whole, stopped, resumed = rest(loader(0)), loader(workers), loader(workers)
    rest(stopped, 4)
    resumed.load_state_dict(stopped.state_dict())
    for (images, targets), (images_too, targets_too) in zip(rest(resumed), whole[4:], strict=True):
        assert torch.equal(images, images_too)
        assert targets == targets_too


def test_damaged_images_are_counted_named_and_passed_over(tree, cut, tmp_path):
    cut(tree / "train" / "red" / "2.jpg")
    (tree / "val" / "blue" / "1.jpg").write_bytes(b"no image")
    pack.pack(tree, tmp_path / "packed")
    training = data.make_loader(split_of(tmp_path / "packed", replace=True), batch=6, workers=0, shuffle=True)
    batches = list(training)
    assert sum(len(batch.targets) for batch in batches) == 18
    (line,) = {line for batch in batches for line in batch.unreadable}
    assert line.startswith(f"{tmp_path}/packed/train/train-000000.tar:red/2.jpg: ")
    testing = list(data.make_loader(split_of(tmp_path / "packed", "val"), batch=9, workers=0, shuffle=False))
    assert [len(batch.targets) for batch in testing] == [8]
    assert testing[0].unreadable == [
        f"{tmp_path}/packed/val/val-000000.tar:blue/1.jpg: not in a format that Pillow decodes"
    ]


def test_shards_of_other_programs(tree, tmp_path, caplog):
    def image(name, number):
        return (tree / "train" / name / f"{number}.jpg").read_bytes()

    root = tmp_path / "foreign"
    samples = [("a/0.jpg", image("red", 0)), ("a/0.cls", b"2\n"), ("a/0.json", b"{}"), ("b/0.cls", b"0")]
    samples += [("b/0.JPEG", image("blue", 0)), ("only.jpg", image("red", 1)), ("none.cls", b"1")]
    samples += [("odd.png", image("green", 1)), ("odd.cls", b"green"), ("c.jpg", image("green", 0)), ("c.cls", b"1")]
    write(root / "train" / "0.tar", samples)
    write(root / "val" / "0.tar", samples[:3])
    with pytest.raises(ValueError, match=r"has no index.json.*give the number of classes in data.classes"):
        data.check_data(DataRecipe(path=str(root)))
    names = data.check_data(DataRecipe(path=str(root), classes=3))
    assert names == ["0", "1", "2"]
    images = split_of(root, classes=names, classes_given=3)
    assert images.targets.tolist() == [2, 0, 1]
    assert [images.load(place)[0].tobytes() for place in range(3)] == [
        split_of(tree).load(place)[0].tobytes() for place in (12, 0, 6)
    ]
    assert [record.message.split(":", 2)[2] for record in caplog.records] == [
        "only: has no class in a .cls file", "none: has no image", "odd: its class b'green' is no number",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"holds class 2, and data.classes=2; raise it"):
        split_of(root, classes=["0", "1"], classes_given=2)


@pytest.mark.parametrize("place", ["cut", "header"])
def test_a_shard_cut_off_or_damaged_gives_what_comes_before(packed, tmp_path, caplog, place):
    (packed / "val" / "index.json").unlink()
    for file in sorted((packed / "val").glob("*.tar"))[1:]:
        file.unlink()
    file = packed / "val" / "val-000000.tar"
    table, _ = shards.scan(file)
    whole = len(table.offsets)
    content = bytearray(file.read_bytes())
    last = int(table.offsets[-1])
    if place == "cut":
        file.write_bytes(content[: last + 10])
    else:
        content[last - 500] ^= 255
        file.write_bytes(content)
    images = split_of(packed, "val", classes=["0", "1", "2"], classes_given=3)
    assert len(images) == whole - 1
    assert any("is cut off or damaged" in record.message for record in caplog.records)


def test_a_shard_that_is_not_the_indexs_is_refused(packed):
    first = packed / "train" / "train-000000.tar"
    content = first.read_bytes()
    first.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=rf"train-000000.tar has {len(content) - 512} bytes, .* copy it again"):
        split_of(packed)
    first.write_bytes(content)
    (packed / "train" / "extra.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"extra.tar is not in .*index.json"):
        split_of(packed)
    (packed / "train" / "extra.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"extra.tar is no plain .tar file"):
        shards.scan(packed / "train" / "extra.tar")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format=9),
        lambda index: index.pop("classes"),
        lambda index: index.update(classes=[1, 2, 3]),
        lambda index: index["shards"][0].update(offsets="x"),
        lambda index: index["shards"][0]["offsets"].pop(),
        lambda index: index["shards"][0]["sizes"].__setitem__(0, 10**9),
        lambda index: index["shards"][0]["targets"].__setitem__(0, 3),
        lambda index: index["shards"][0]["targets"].__setitem__(0, -1),
        lambda index: index["shards"][0].pop("bytes"),
    ],
)
def test_a_damaged_index_is_refused(packed, change):
    file = packed / "train" / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is no index of shards .* pack again"):
        split_of(packed)


def test_a_count_that_differs_from_the_index_is_refused(packed):
    with pytest.raises(ValueError, match=r"data.classes=4, but .*index.json names 3; leave it out"):
        split_of(packed, classes_given=4)


def test_webdataset_missing_is_said_with_the_remedy(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"pip install 'visionmix\[shards\]'"):
        shards.library()


def test_a_training_run_over_shards(packed, recipe_file, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [str(recipe_file), "--data", str(packed), "--output", str(output), "--device", "cpu", "--epochs", "2"]
    assert train.main(arguments) == 0, capsys.readouterr().err
    assert "18 train and 9 test images" in capsys.readouterr().out
    assert last_of(output).name == "epoch_0002"

"""Shards behind URLs: fetched whole or not at all, once for all processes, then the images of local ones."""

import csv
import io
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from small_runs import last_of

from visionmix.tools import checkpoint, data, pack, predict, recipe, remote, shards, train, validate
from visionmix.tools.recipe_keys import DataRecipe

pytest.importorskip("webdataset")

NORMALISE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
STILL = data.eval_transform(32, "bicubic", 1.0, NORMALISE)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, except for the faults that the server is told to have, one for each request of a path."""

    def do_GET(self):
        self.server.seen.append(self.path)
        faults = self.server.faults.get(self.path)
        if not faults:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        fault = faults.pop(0)
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "slow":
            time.sleep(0.5)
            return super().do_GET()
        self.protocol_version = "HTTP/1.1" if "chunked" in fault else "HTTP/1.0"
        self.send_response(200)
        if "chunked" in fault:
            self.send_header("Transfer-Encoding", "chunked")
        elif fault == "cut":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sent = content[: len(content) // 2] if "cut" in fault else content
        self.wfile.write(b"%x\r\n%b\r\n" % (len(sent), sent) if "chunked" in fault else sent)
        if fault == "chunked":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the folder `served`, with `address`, the paths it has `seen` and its `faults` by path."""
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT", 0.001)
    (tmp_path / "served").mkdir()
    made = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Handler(*given, directory=str(tmp_path / "served")))
    made.folder, made.seen, made.faults = tmp_path / "served", [], {}
    made.address = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def file(server):
    """A file of the server: its URL, path there, and content."""
    content = bytes(range(256)) * 40
    (server.folder / "a").mkdir()
    (server.folder / "a" / "one.tar").write_bytes(content)
    return f"{server.address}/a/one.tar", "/a/one.tar", content


@pytest.fixture
def packed(server, tree, monkeypatch):
    """Several small shards a split, of the images in `tree`, behind the server; the pattern of their URLs."""
    monkeypatch.setattr(pack, "_MEGABYTE", 4000)
    pack.pack(tree, server.folder / "in", shard_size=1)
    counts = {split: len(list((server.folder / "in" / split).glob("*.tar"))) - 1 for split in ("train", "val")}
    assert min(counts.values()) > 0
    names = [f"{split}/{split}-{{000000..{last:06d}}}" for split, last in counts.items()]
    return f"{server.address}/in/{{{','.join(names)}}}.tar"


def left(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def test_a_file_is_fetched_once_and_lies_in_the_cache_as_its_url_says(server, file, tmp_path):
    url, path, content = file
    place = tmp_path / "cache" / f"127.0.0.1:{server.server_port}" / "a" / "one.tar"
    assert remote.fetch([url, "one/path"]) == [place, Path("one/path")]
    assert place.read_bytes() == content
    assert remote.fetch([url]) == [place]
    assert server.seen == [path]


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv(remote.CACHE, raising=False)
    assert remote.local("https://host/a%20b/c.tar") == Path.home() / ".cache" / "visionmix" / "host" / "a b" / "c.tar"


@pytest.mark.parametrize("faults", [["cut", "cut"], ["chunked cut"], [503, 429], ["chunked"]])
def test_a_try_that_fails_is_made_again(server, file, tmp_path, faults):
    url, path, content = file
    server.faults[path] = list(faults)
    (found,) = remote.fetch([url])
    assert found.read_bytes() == content
    assert len(server.seen) == len(faults) + (faults != ["chunked"])
    assert left(tmp_path / "cache") == ["one.tar"]


@pytest.mark.parametrize(
    ("fault", "kind", "words", "tries"),
    [
        (
            "cut",
            ConnectionError,
            r"in 5 tries: the connection ended after 5120 of 10240 bytes; .* make the call again",
            5,
        ),
        (500, ConnectionError, r"in 5 tries: HTTP 500 Internal Server Error; see whether this machine reaches", 5),
        (404, FileNotFoundError, r"the server has no .*HTTP 404.*check the name and its numbers", 1),
        (403, PermissionError, r"the server refuses .*HTTP 403.*fetch it by other means", 1),
        ("no length", OSError, r"does not say how long .* let it send Content-Length", 1),
    ],
)
def test_a_file_that_does_not_come_whole_is_not_there(server, file, tmp_path, fault, kind, words, tries):
    url, path, content = file
    server.faults[path] = [fault] * 9
    with pytest.raises(kind, match=words) as caught:
        remote.fetch([url])
    assert url in str(caught.value)
    assert len(server.seen) == tries
    assert left(tmp_path / "cache") == []
    server.faults.clear()
    assert remote.fetch([url])[0].read_bytes() == content


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE, str(tmp_path))
    monkeypatch.setattr(remote, "WAIT", 0)
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/a.tar could not be fetched .*refused"):
        remote.fetch(["http://127.0.0.1:9/a.tar"])


def test_a_full_disk_ends_the_first_try(server, file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*one.tar: the disk is full, make room"):
        remote.fetch([file[0]])
    assert len(server.seen) == 1
    assert left(tmp_path / "cache") == []


def test_of_two_processes_one_fetches_while_the_other_waits(server, file):
    url, path, content = file
    server.faults[path] = ["slow", "slow"]
    place = remote.local(url)
    place.parent.mkdir(parents=True)
    (place.parent / ".one.tar.1234567").write_bytes(b"of a process that was killed")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=lambda: os._exit(remote.fetch([url])[0].read_bytes() != content)) for _ in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert server.seen == [path]
    assert left(place.parent) == ["one.tar"]


@pytest.mark.parametrize(
    "url", ["http://host", "http://host/", "http://host/a/../b.tar", "https://h/a.tar?x=1", "http:///a"]
)
def test_urls_of_no_file_are_refused(url):
    with pytest.raises(ValueError, match=re.escape(f"{url} is not the URL of a file; give http://host/folder/file")):
        remote.local(url)


def opened(path, split="train", transform=STILL, **options):
    wanted = DataRecipe(path=str(path), **options)
    return data.open_split(wanted, split, data.check_data(wanted), transform, seed=3)


def test_shards_behind_urls_hold_the_images_of_local_ones(server, packed):
    for split in ("train", "val"):
        far, near = opened(packed, split), opened(server.folder / "in", split)
        assert len(far) == len(near) > 0
        assert [far.load(i)[0].tobytes() for i in range(len(far))] == [
            near.load(i)[0].tobytes() for i in range(len(near))
        ]
        assert far.targets.tolist() == near.targets.tolist()
    assert len(server.seen) == len(set(server.seen)) == len(left(server.folder / "in"))
    server.faults = {path: [500] * 9 for path in server.seen}
    assert data.check_data(DataRecipe(path=packed)) == ["blue", "green", "red"]  # from the cache alone


def test_each_way_to_say_where_the_shards_are(server, packed):
    train_shards = re.sub(r"\{train/(.*),val.*", r"train/\1.tar", packed)
    val_shards = "val/val-{000000,000001}.tar"
    for wanted in (
        DataRecipe(path=server.address + "/in", train=train_shards, val=val_shards),
        DataRecipe(path="nowhere", train=train_shards, val=f"{server.address}/in/{val_shards}"),
    ):
        classes = data.check_data(wanted)
        assert len(data.open_split(wanted, "train", classes, STILL)) == 18
        assert {Path(name).name for name in data.open_split(wanted, "val", classes).files} == {
            "val-000000.tar", "val-000001.tar",
        }  # fmt: skip
    assert data.absolute(packed) == packed
    with pytest.raises(ValueError, match=r"/in is not the URL of a .tar file; give a pattern of them"):
        data.check_data(DataRecipe(path=server.address + "/in"))
    with pytest.raises(FileNotFoundError, match=r"the server has no .*/in/train/train-999999.tar \(HTTP 404"):
        data.check_data(DataRecipe(path=f"{server.address}/in/{{train/train-999999,val/val-000000}}.tar"))
    with pytest.raises(FileNotFoundError, match="has no shards of val"):
        data.check_data(DataRecipe(path=train_shards))


def test_shards_without_an_index_need_the_number_of_classes(server, packed):
    for split in ("train", "val"):
        (server.folder / "in" / split / "index.json").unlink()
    with pytest.raises(ValueError, match=r"has no index.json.*give the number of classes in data.classes"):
        opened(packed)
    assert opened(packed, classes=3).targets.tolist() == opened(server.folder / "in", classes=3).targets.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_see_each_image_once_and_go_on_in_mid_epoch_as_with_local_shards(server, packed, workers):
    made = recipe.from_dict({"data": {"image_size": 16}, "augment": {"erase_prob": 0.5}}, "test")

    def loader(path, rank, workers):
        images = opened(path, transform=data.train_transform(made, NORMALISE))
        made_loader = data.make_loader(images, batch=3, workers=workers, shuffle=True, seed=3, rank=rank, world=2)
        made_loader.sampler.set_epoch(1)
        return made_loader

    keys = []
    for rank in range(2):
        near = list(loader(server.folder / "in", rank, 0))
        stopped, resumed = loader(packed, rank, workers), loader(packed, rank, workers)
        far = [next(iter(stopped))]
        resumed.load_state_dict(stopped.state_dict())
        far += list(resumed)
        assert len(near) == len(far) == 3
        for one, other in zip(near, far, strict=True):
            assert torch.equal(one.images, other.images)
            assert one.targets.tolist() == other.targets.tolist()
        epoch = resumed.sampler.keys()
        keys += [key.index for key in epoch]
    assert sorted(keys) == list(range(18))


def test_a_training_run_over_urls(packed, recipe_file, tmp_path, capsys):
    output = tmp_path / "out"
    assert (
        train.main([str(recipe_file), "--data", packed, "--output", str(output), "--device", "cpu", "--epochs", "2"])
        == 0
    )
    assert "18 train and 9 test images" in capsys.readouterr().out
    assert checkpoint.read(last_of(output))["recipe"]["data"]["path"] == packed


def rows_of(path):
    with path.open() as opened:
        return list(csv.DictReader(opened))


def test_validate_takes_shards_by_path_and_url(server, packed, whole_run, tree, tmp_path, capsys):
    call = ["--checkpoint", str(whole_run[0] / "best.safetensors"), "--workers", "0", "--csv", str(tmp_path / "r.csv")]
    (server.folder / "odd").mkdir()
    numbers = pack_numbers(tree, server.folder / "odd" / "photos.tar")
    (tmp_path / "map").write_text("0 blue\n1 green\n2 red\n")
    for place in (tree, server.folder / "in", packed):
        assert validate.main([*call, "--data", str(place)]) == 0, capsys.readouterr().err
    odd = f"{server.address}/odd/photos.tar"
    assert validate.main([*call, "--data", odd, "--class-map", str(tmp_path / "map")]) == 0, capsys.readouterr().err
    rows = rows_of(tmp_path / "r.csv")
    assert [row["data"] for row in rows] == [str(tree / "val"), str(server.folder / "in"), packed, odd]
    assert {(row["images"], row["top1"], row["classes"]) for row in rows} == {("9", rows[0]["top1"], "3")}
    assert [float(row["loss"]) for row in rows] == pytest.approx([float(rows[0]["loss"])] * 4, rel=1e-5)
    assert numbers == 9
    assert validate.main([*call, "--data", packed]) == 0
    assert "has this test" in capsys.readouterr().out
    for more, words in (
        (["--data", odd], "has no index.json, which names the classes of its shards; say by --class-map FILE"),
        (["--data", packed, "--real-labels", "real.json"], "--real-labels goes by the names of images in a folder"),
        (["--data", f"{server.address}/in/val-9.tar"], "the server has no"),
    ):
        assert validate.main([*call, *more]) == 2
        assert words in capsys.readouterr().err


def pack_numbers(tree, shard):
    """Write the test images of `tree` as another program does, with the numbers of their classes; return how many."""
    files = sorted((tree / "val").rglob("*.jpg"))
    with tarfile.open(shard, "w") as tar:
        for number, file in enumerate(files):
            tar.add(file, f"{number:04d}.jpg")
            member = tarfile.TarInfo(f"{number:04d}.cls")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"%d" % ["blue", "green", "red"].index(file.parent.name)))
    return len(files)


def test_predict_names_pictures_by_url(server, packed, whole_run, tmp_path, capsys, monkeypatch):
    call = ["--checkpoint", str(whole_run[0] / "best.safetensors"), "--workers", "0", "--topk", "1"]
    urls = shards.expand(packed)
    near = [str(server.folder / url.removeprefix(server.address + "/")) for url in urls]
    for name, given in (("far", [packed]), ("near", near)):
        assert predict.main([*given, *call, "--output", str(tmp_path / f"{name}.csv")]) == 0
    far, near = rows_of(tmp_path / "far.csv"), rows_of(tmp_path / "near.csv")
    assert len(far) == 27
    for one, other in zip(far, near, strict=True):
        assert one.pop("image") == other.pop("image").replace(str(server.folder), server.address)
        assert one == other
    find_items = predict.find_items

    def found_by_another_machine(given):
        items = find_items(given)
        shutil.rmtree(tmp_path / "cache")
        return items

    monkeypatch.setattr(predict, "find_items", found_by_another_machine)
    assert predict.main([packed, *call, "--output", str(tmp_path / "again.csv")]) == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "far.csv").read_bytes()
    monkeypatch.setattr(predict, "find_items", find_items)
    assert predict.main([f"{server.address}/none-{{0..1}}.tar", *call]) == 2
    assert f"predict: the server has no {server.address}/none-0.tar (HTTP 404" in capsys.readouterr().err

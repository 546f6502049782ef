"""Pack an image folder into WebDataset shards: a few large files in place of millions of small ones.

    visionmix pack /data/imagenet /data/imagenet-shards
    visionmix train imagenet/vig_s.yaml --data /data/imagenet-shards

Files go in as they are, the training images in a shuffled order that is always the same. OUT/train and OUT/val hold the
shards and index.json, which names the classes and tells where each image lies, with counts and checksums. Every shard
is read back and compared before it gets its name, and the indexes are written last: without them nothing is packed.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from visionmix.tools import display, shards
from visionmix.tools.arguments import check_least
from visionmix.tools.checkpoint import write_aside
from visionmix.tools.data import FolderSet, check_folders, split_folder

_MEGABYTE = 10**6


def keys_of(folder: Path, files: Sequence[str]) -> list[str]:
    """Return the samples' names: CLASS/FILE without its ending and dots, at which webdataset would cut it off.

    Those that would be alike are told apart by their number.
    """
    keys, seen = [], set()
    for number, file in enumerate(files):
        path = Path(file).relative_to(folder)
        key = str(path.parent / path.stem).replace(".", "_")
        key = f"{key}-{number}" if key in seen else key
        seen.add(key)
        keys.append(key)
    return keys


def cut(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Yield the samples of each shard, in order: as many as stay within `limit` bytes of images, and at least one."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if total + size > limit and number > first:
            yield range(first, number)
            first, total = number, 0
        total += size
    yield range(first, len(sizes))


def write_shard(path: Path, samples: Sequence[tuple[str, str, int]]) -> dict:
    """Write a shard and read it back; return its entry of the index.

    Args:
        path: of the shard.
        samples: (name in the shard, image file, class index) of each.

    Raises:
        OSError: an image cannot be read, the disk is full, or it gives back other bytes than were written; there is no
            file `path` then.
    """
    entry: dict = {}

    def write(aside: Path) -> None:
        digests = []
        # Nothing of the machine, the user or the hour, so that the same images give the same bytes.
        same = {"user": "", "group": "", "mtime": 0, "format": "GNU_FORMAT"}
        with aside.open("wb") as file, shards.library().TarWriter(file, encoder=False, **same) as tar:
            for key, source, target in samples:
                content = Path(source).read_bytes()
                digests.append(hashlib.sha256(content).digest())
                ending = Path(source).suffix.lower().removeprefix(".")
                tar.write({"__key__": key, ending: content, "cls": str(target).encode()})
        table, left_out = shards.scan(aside)
        if left_out or table.targets.tolist() != [target for _, _, target in samples]:
            raise OSError(f"{aside} does not hold the samples that were written; the disk or memory is at fault")
        with aside.open("rb") as file:
            for offset, size, digest in zip(table.offsets.tolist(), table.sizes.tolist(), digests, strict=True):
                file.seek(offset)
                if hashlib.sha256(file.read(size)).digest() != digest:
                    raise OSError(f"{aside} gives back other bytes than were written; the disk or memory is at fault")
            file.seek(0)
            checksum = hashlib.sha256()
            while chunk := file.read(_MEGABYTE):
                checksum.update(chunk)
        entry.update(
            name=path.name, samples=len(samples), bytes=aside.stat().st_size, sha256=checksum.hexdigest(),
            **{name: getattr(table, name).tolist() for name in ("offsets", "sizes", "targets")},
        )  # fmt: skip

    write_aside(path, write)
    return entry


def check_out(folder: Path, out: Path) -> None:
    """Raise ValueError or FileExistsError where `out` is no place to pack `folder` to."""
    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise ValueError(f"OUT={out} lies in the image folder {folder}; pack to a place outside it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT={out} is no empty folder; empty it, also of what an interrupted call left there")


def pack(folder: Path, out: Path, *, shard_size: int = 256) -> dict[str, dict]:
    """Pack an image folder; return the index of each split.

    Args:
        folder: with train/CLASS/* and val/CLASS/*.
        out: folder of the shards.
        shard_size: megabytes of a shard's images.

    Raises:
        ValueError: an argument is out of range, or the folder is no image folder.
        OSError: the folder is missing, `out` holds something else, or reading or writing fails.
    """
    check_least(1, shard_size=shard_size)
    shards.library()
    check_out(folder, out)
    classes = check_folders(folder)
    indexes = {}
    console = display.table_console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for split in ("train", "val"):
            root = split_folder(folder, split)
            images = FolderSet(root, classes, None, seed=0, replace=False)
            keys = keys_of(root, [file for file, _ in images.samples])
            order = np.arange(len(images))
            if split == "train":  # mixed classes, for those who read shards from end to end
                order = np.random.default_rng(0).permutation(len(images))
            samples = [(keys[number], *images.samples[number]) for number in order]
            sizes = [Path(file).stat().st_size for _, file, _ in samples]
            task = progress.add_task(f"packing {split}", total=len(samples))
            entries = []
            for number, places in enumerate(cut(sizes, shard_size * _MEGABYTE)):
                name = f"{split}-{number:06d}.tar"
                entries.append(write_shard(out / split / name, [samples[place] for place in places]))
                progress.advance(task, len(places))
            counts = np.bincount([target for _, target in images.samples], minlength=len(classes)).tolist()
            about = {"format": shards.FORMAT, "samples": len(samples), "classes": classes, "counts": counts}
            indexes[split] = {**about, "shards": entries}
    for split, index in indexes.items():
        text = json.dumps(index, separators=(",", ":"))
        write_aside(out / split / shards.INDEX, lambda aside, text=text: aside.write_text(text))
    return indexes


def main(argv: list[str] | None = None) -> int:
    """Run `visionmix pack FOLDER OUT`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="visionmix pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="image folder, with train/CLASS/* and val/CLASS/*")
    parser.add_argument("out", type=Path, help="folder of the shards")
    parser.add_argument(
        "--shard-size", type=int, default=256, metavar="MB", help="megabytes of a shard's images (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        indexes = pack(args.folder, args.out, shard_size=args.shard_size)
    except (ValueError, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 2
    for split, index in indexes.items():
        size = sum(entry["bytes"] for entry in index["shards"])
        print(
            f"{args.out / split}: {index['samples']} images of {len(index['classes'])} classes in "
            f"{len(index['shards'])} shard(s), {size / 1e6:.1f} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

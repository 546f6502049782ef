"""Class maps: the forms of the file, what they stand for, and every mistake in a line."""

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from visionmix.tools.class_map import find_outputs, read_class_map
from visionmix.tools.models import Outputs

WHERE = Path("photos/val")


def outputs(count, labels=None, own=False):
    return Outputs("test_vit", count, labels, own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat 281\ndog  n02085620\n\n", {"cat": "281", "dog": "n02085620"}),
        ("cat\ttabby, tabby cat\nbig dog\t7\r\n", {"cat": "tabby, tabby cat", "big dog": "7"}),
        ("n01440764\nn01443537\n", {"n01440764": "0", "n01443537": "1"}),
        (' {"cat": 281, "big dog": "tench"}', {"cat": "281", "big dog": "tench"}),
        ("\ufeffcat 3", {"cat": "3"}),
    ],
)
def test_read_class_map(tmp_path, text, expected):
    (tmp_path / "map").write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / "map") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cat 281\ndog", "'dog' has no output"),
        (b'{"cat": [1]}', "other than an index or a label"),
        (b'{"cat": true}', "other than an index or a label"),
        (b'["cat"]', "other than an index or a label"),
        (b'{"cat": 1', "is not a class map"),
        (b"\xff\xfe\x00", "is not a class map"),
        (b"cat 1\ncat 2", "'cat' twice"),
        (b'{"cat": 1, "cat": 2}', "'cat' twice"),
    ],
)
def test_a_file_that_is_not_a_class_map(tmp_path, content, words):
    (tmp_path / "map").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_class_map(tmp_path / "map")
    assert str(tmp_path / "map") in str(caught.value)


def test_a_missing_class_map(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_class_map(tmp_path / "nowhere")


def test_labels_of_imagenet_in_every_form():
    info = ImageNetInfo()
    tench = {"a": "0", "b": "n01440764", "c": "tench", "d": "Tench, Tinca tinca", "e": "n01443537"}
    assert info.index_to_label_name(0) == "n01440764"
    assert find_outputs(list("abcde"), outputs(1000), WHERE, tench) == [0, 0, 0, 0, 1]
    assert find_outputs(["n01443537", "n01440764"], outputs(1000), WHERE) == [1, 0]
    larger = ImageNetInfo("imagenet-22k").label_names()
    assert find_outputs(["n01440764"], outputs(len(larger)), WHERE) == [larger.index("n01440764")]


def test_all_synsets_are_their_own_outputs():
    assert find_outputs(ImageNetInfo().label_names(), outputs(1000), WHERE) == list(range(1000))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("1000", r"output 1000 is outside \[0, 999\]"),
        ("-1", "no output has the label '-1'"),
        ("unicorn", "no output has the label 'unicorn'"),
        ("crane", "2 outputs have the label 'crane': 134, 517"),
    ],
)
def test_entries_that_stand_for_no_output(written, words):
    with pytest.raises(ValueError, match=f"--class-map: {words}; test_vit has 1000 outputs"):
        find_outputs(["a"], outputs(1000), WHERE, {"a": written})


def test_a_class_map_must_name_every_folder():
    with pytest.raises(ValueError, match=r"lacks 1 folder\(s\) of photos/val: b"):
        find_outputs(["a", "b"], outputs(1000), WHERE, {"a": "1", "c": "2"})


def test_own_labels_come_before_imagenets():
    own = outputs(3, ["n01440764", "10", "2"], own=True)
    assert find_outputs(["10", "2"], own, WHERE) == [1, 2]
    assert find_outputs(["a"], own, WHERE, {"a": "2"}) == [2]  # an index, as the file says
    with pytest.raises(
        ValueError, match=r"has 1 classes, the weights of test_vit have 3 outputs.*other classes than a"
    ):
        find_outputs(["a"], own, WHERE)


def test_folders_without_known_names_need_the_models_number(caplog):
    assert find_outputs(["a", "b"], outputs(2), WHERE) == [0, 1]
    assert not caplog.records
    for folders in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=rf"photos/val has {len(folders)} classes, .* have 2 outputs"):
            find_outputs(folders, outputs(2), WHERE)
    names = [f"class {number:04d}" for number in range(1000)]
    assert find_outputs(names, outputs(1000), WHERE) == list(range(1000))
    assert "no folder has the name of a label" in caplog.text
    with pytest.raises(ValueError, match="other classes than class 0001"):
        find_outputs(["n01440764", *names[1:]], outputs(1000), WHERE)


def test_a_model_without_classifier():
    with pytest.raises(ValueError, match="num_classes=0 and tells no classes apart"):
        find_outputs(["a"], outputs(0), WHERE)

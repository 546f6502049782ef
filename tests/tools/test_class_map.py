"""Class maps: the forms of the file, what they stand for, and every mistake in a line."""

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from visionmix.tools.class_map import all_outputs, find_outputs, read_class_map, synset_outputs
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


@pytest.mark.parametrize("count", [2, 1000])
def test_folders_without_known_names_are_refused_as_many_as_there_are(count):
    names = [str(number) for number in range(count)]  # as ImageNet-V2 has them, whose sorted order is another
    with pytest.raises(ValueError, match=rf"photos/val has {count} classes.*`LC_ALL=C ls photos/val > FILE`"):
        find_outputs(sorted(names), outputs(count), WHERE)
    with pytest.raises(ValueError, match=f"photos/val has {count - 1} classes.*which output each stands for$"):
        find_outputs(names[1:], outputs(count), WHERE)
    numbers = {name: name for name in names}
    assert find_outputs(sorted(names), outputs(count), WHERE, numbers) == [int(name) for name in sorted(names)]


def test_one_synset_among_other_names_is_refused():
    with pytest.raises(ValueError, match="other classes than class 0001"):
        find_outputs(["n01440764", *(f"class {number:04d}" for number in range(1, 1000))], outputs(1000), WHERE)


def test_names_alone_do_not_number_the_outputs_of_a_model_that_has_more():
    names = ImageNetInfo().label_names()[100:103]  # as `ls` prints them of a folder of ImageNet-A
    numbers = {name: str(place) for place, name in enumerate(names)}
    with pytest.raises(
        ValueError, match=f'{names[0]} is output 0, where test_vit has it as output 100 .*"{names[0]} n'
    ):
        find_outputs(names, outputs(1000), WHERE, numbers)
    assert find_outputs(names, outputs(3), WHERE, numbers) == [0, 1, 2]
    assert find_outputs(["cat"], outputs(1000), WHERE, {"cat": "0"}) == [0]


def test_all_outputs_of_a_map_with_folders_that_are_not_there():
    assert all_outputs(outputs(1000), {"a": "7", "b": "tench", "c": "7"}) == [0, 7]


def test_outputs_of_imagenets_classes():
    assert synset_outputs(outputs(1000)) == list(range(1000))
    names = ImageNetInfo().label_names()
    turned = outputs(1001, ["other", *reversed(names)], own=True)
    assert synset_outputs(turned) == list(range(1000, 0, -1))
    assert synset_outputs(outputs(1000, ["a"] * 1000, own=True)) is None
    assert synset_outputs(outputs(999)) is None


def test_a_model_without_classifier():
    with pytest.raises(ValueError, match="num_classes=0 and tells no classes apart"):
        find_outputs(["a"], outputs(0), WHERE)

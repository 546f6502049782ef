"""Recipes: which values arrive, and how mistakes are answered."""

import json
from pathlib import Path

import pytest
import timm

from visionmix.tools import recipe

CONFIGS = Path(__file__).parents[2] / "configs"

# name: peak lr at batch 512, weight decay, drop path, amp (the published configurations)
PUBLISHED = {
    "vig_t": (1e-3, 0.05, 0.0, "none"),
    "vig_s": (5e-4, 0.1, 0.2, "none"),
    "vig_b": (1e-3, 0.05, 0.5, "none"),
    "vig_h_t": (8e-4, 0.05, 0.2, "float16"),
    "vig_h_s": (5e-4, 0.05, 0.3, "float16"),
    "vig_h_b": (5e-4, 0.05, 0.6, "float16"),
}


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    made = recipe.read(f"imagenet/{name}.yaml")
    lr, decay, drop_path, amp = PUBLISHED[name]
    assert made.model.name == name
    assert (made.optimizer.lr, made.optimizer.weight_decay, made.train.amp) == (lr, decay, amp)
    assert made.model.kwargs == {"drop_path_rate": drop_path}
    assert (made.schedule.epochs, made.schedule.warmup_epochs, made.optimizer.clip_grad) == (300, 20, 5.0)
    assert (made.schedule.warmup_lr, made.schedule.min_lr, made.optimizer.lr_batch) == (5e-7, 5e-6, 512)
    assert made.optimizer.kwargs == {"betas": [0.9, 0.999], "eps": 1e-8}
    assert (made.augment.mixup, made.augment.cutmix, made.augment.erase_prob) == (0.8, 1.0, 0.25)
    assert (made.train.ema_decay, made.train.label_smoothing) == (0.9999, 0.1)


def test_every_packaged_recipe_is_found_by_path_and_by_name():
    paths = sorted(CONFIGS.glob("*/*.yaml"))
    for path in paths:
        name = str(path.relative_to(CONFIGS))
        for given in (name, name.removesuffix(".yaml"), str(path), f"configs/{name}"):
            assert recipe.find(given).samefile(path)
    name = str(paths[0].relative_to(CONFIGS))
    assert recipe.read(name) == recipe.read(str(paths[0])) == recipe.read(f"configs/{name}")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("optimizer: {learing_rate: 0.1}", ValueError, ("optimizer.learing_rate=0.1", "optimizer.")),
        ("optimizer: {weigth_decay: 0.1}", ValueError, ("did you mean 'optimizer.weight_decay'",)),
        ("train: {lr: 0.1}", ValueError, ("train.lr=0.1", "did you mean 'optimizer.lr'?")),
        ("optimiser: {lr: 0.1}", ValueError, ("optimiser", "did you mean 'optimizer'")),
        ("epochs: 3", ValueError, ("epochs=3", "did you mean 'schedule.epochs'")),
        ("schedule: {epochs: many}", TypeError, ("schedule.epochs='many' is str; it must be int",)),
        ("schedule: {epochs: 2.5}", TypeError, ("schedule.epochs=2.5", "int")),
        ("schedule: {epochs: true}", TypeError, ("schedule.epochs=True is bool",)),
        ("augment: {scale: 0.5}", TypeError, ("augment.scale=0.5", "list[float]")),
        ("augment: {scale: [a, b]}", TypeError, ("augment.scale[0]='a'",)),
        ("model: vig_s", TypeError, ("model='vig_s'", "section")),
        ("schedule: {epochs: 0}", ValueError, ("schedule.epochs=0", "at least 1")),
        ("schedule: {epochs: 5, warmup_epochs: 5}", ValueError, ("warmup_epochs=5", "lower it")),
        ("train: {amp: half}", ValueError, ("train.amp='half'", "float16, bfloat16")),
        ("train: {ema_decay: 1.5}", ValueError, ("ema_decay=1.5", "[0, 1)")),
        ("data: {batch_size: 7}\naugment: {mixup: 1}", ValueError, ("batch_size=7", "even")),
        ("[1, 2]", ValueError, ("holds list",)),
        ("model: {name: [", ValueError, ("is not YAML",)),
        ("data: {image_size: '48'}", TypeError, ("data.image_size='48' is str; it must be int",)),
        ("model: {name: 3}", TypeError, ("model.name=3 is int; it must be str",)),
        ("train: {ema_warmup: 1}", TypeError, ("train.ema_warmup=1 is int; it must be bool",)),
        ("train: {amp: off}", ValueError, ("train.amp=False is not one of none, float16",)),
        ("augment: {scale: ['0.1', 1]}", TypeError, ("augment.scale[0]='0.1' is str; it must be float",)),
        ("data: {mean: {a: 1}}", TypeError, ("data.mean={'a': 1} is dict; it must be list[float] | None",)),
        ("data: {path: [a]}", TypeError, ("data.path=['a'] is list; it must be str | None",)),
        ("model: {kwargs: [1]}", TypeError, ("model.kwargs=[1] is list; it must be dict",)),
        ("model: {kwargs: {1: 2}}", TypeError, ("model.kwargs.1=2",)),
        ("optimizer: {lr: .nan}", ValueError, ("optimizer.lr=nan", "at least 0")),
        ("optimizer: {lr: .inf}", ValueError, ("optimizer.lr=inf", "finite")),
        ("optimizer: {lr_batch: 0}", ValueError, ("optimizer.lr_batch=0", "at least 1")),
        ("optimizer: {weight_decay: -0.1}", ValueError, ("optimizer.weight_decay=-0.1", "at least 0")),
        ("schedule: {warmup_lr: -1.0}", ValueError, ("schedule.warmup_lr=-1.0", "at least 0")),
        ("schedule: {min_lr: -1.0}", ValueError, ("schedule.min_lr=-1.0", "at least 0")),
        ("train: {seed: -1}", ValueError, ("train.seed=-1", "at least 0")),
        ("optimizer: {lr: 1.0, lr: 2.0}", ValueError, ("duplicate key lr",)),
        ("data:\n  path: ???", ValueError, ("data.path='???'", "leave the key out")),
        ("data: {path: '${data.root}'}", ValueError, ("data.path", "'data.root' not found")),
        ("data: {image_size: '${data.path}', path: x}", ValueError, ("data.image_size", "could not be converted")),
        ("3", ValueError, ("is not YAML of sections", "int")),
        ("base: nothing.yaml", FileNotFoundError, ("base='nothing.yaml'",)),
        ("base: r.yaml", ValueError, ("based on this one",)),
    ],
)
def test_mistakes_are_named_with_file_key_and_value(tmp_path, text, error, words):
    path = write(tmp_path, text)
    with pytest.raises(error) as caught:
        recipe.read(path)
    for word in (*words, "r.yaml"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("[24, 48]", [24, 48]),
        ("[[na, dina], softmax]", [["na", "dina"], "softmax"]),
        ("{name: na, kernel_size: 5, bias: null}", {"name": "na", "kernel_size": 5, "bias": None}),
        ("null", None),
        ("1e-3", 1e-3),
        ("3", 3),
        ("'3'", "3"),
        ("true", True),
        ("gelu", "gelu"),
        ("${data.image_size}", 224),
    ],
)
def test_kwargs_arrive_as_plain_values(tmp_path, value, meant):
    path = write(tmp_path, f"model:\n  kwargs:\n    option: {value}\n")
    for made in (recipe.read(path), recipe.read("demo/bakeoff.yaml", {}, [f"model.kwargs.option={value}"])):
        if not value.startswith("$"):
            assert made.model.kwargs["option"] == meant
        pending = [recipe.to_dict(made)]
        while pending:
            item = pending.pop()
            assert type(item) in (dict, list, str, int, float, bool, type(None))
            pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
    assert recipe.read(path).model.kwargs == {"option": meant}


def test_a_tuple_of_a_program_or_of_an_old_checkpoint_stays_one():
    made = recipe.from_dict({"model": {"kwargs": {"depths": (1, 2)}}, "augment": {"scale": (0.5, 1)}}, "checkpoint")
    assert made.model.kwargs == {"depths": (1, 2)}
    assert made.augment.scale == [0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "remedy"), [("None", "null"), ("(1, 2)", "[1, 2]"), ("-.5", "-0.5"), ("(None, 'na')", '[null, "na"]')]
)
@pytest.mark.parametrize("key", ["data.path", "model.kwargs.option"])
def test_python_literals_that_yaml_reads_as_text_are_refused(tmp_path, key, value, remedy):
    section, _, option = key.partition(".")
    path = write(tmp_path, f"{section}:\n  " + option.replace(".", ":\n    ") + f": {value}\n")
    for arguments in ((path,), ("demo/bakeoff.yaml", {}, [f"{key}={value}"])):
        with pytest.raises(ValueError, match="is a text in YAML") as caught:
            recipe.read(*arguments)
        assert f"{key}={value!r}" in str(caught.value)
        assert f"write {remedy}, without quotes" in str(caught.value)


def test_a_recipe_rebuilds_its_model():
    """A checkpoint's recipe alone gives the model of the run, mixers by name and by dictionary."""
    settings = ["model.kwargs.mixer=[{name: na, kernel_size: 3}, softmax, gated_linear_attention]"]
    made = recipe.read("demo/bakeoff.yaml", {}, settings)
    again = recipe.from_dict(json.loads(json.dumps(recipe.to_dict(made))), "checkpoint")
    states = [timm.create_model(one.model.name, **one.model.kwargs).state_dict() for one in (made, again)]
    assert {key: value.shape for key, value in states[0].items()} == {
        key: value.shape for key, value in states[1].items()
    }
    assert any("position_bias" in key or ".qkv." in key for key in states[0])


def test_a_base_is_overridden_option_by_option(tmp_path):
    write(tmp_path, "schedule: {epochs: 9, warmup_epochs: 2}\nmodel: {kwargs: {a: 1, b: 2}}", "base.yaml")
    made = recipe.read(write(tmp_path, "base: base.yaml\nschedule: {epochs: 5}\nmodel: {kwargs: {b: 3}}"))
    assert (made.schedule.epochs, made.schedule.warmup_epochs, made.model.kwargs) == (5, 2, {"a": 1, "b": 3})


def test_a_mistake_in_the_base_names_the_base(tmp_path):
    write(tmp_path, "schedule: {epoch: 9}", "base.yaml")
    with pytest.raises(ValueError, match=r"base\.yaml: schedule\.epoch=9 .*did you mean 'schedule\.epochs'"):
        recipe.read(write(tmp_path, "base: base.yaml"))


def test_overrides(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 1e-2}")
    assert recipe.read(path).optimizer.lr == 0.01
    made = recipe.read(
        path, {"schedule": {"epochs": 40}}, ["optimizer.lr=1e-3", "optimizer.clip_grad=null", "model.kwargs.depth=3"]
    )
    assert (made.schedule.epochs, made.optimizer.lr, made.optimizer.clip_grad) == (40, 1e-3, None)
    assert made.model.kwargs == {"depth": 3}


@pytest.mark.parametrize("text", ["lr=3", "optimizer.lr", "=3", "optimizer.=3"])
def test_a_malformed_override_says_the_form(tmp_path, text):
    with pytest.raises(ValueError, match=r"section\.option=value"):
        recipe.read(write(tmp_path, "{}"), settings=[text])


def test_an_unknown_recipe_lists_the_packaged_ones():
    with pytest.raises(FileNotFoundError, match=r"imagenet/vig_s\.yaml"):
        recipe.read("imagenet/vig_z.yaml")


def test_round_trip_and_differences():
    made = recipe.read("imagenet/vig_t.yaml")
    tree = recipe.to_dict(made)
    assert recipe.from_dict(tree, "checkpoint") == made
    other = recipe.to_dict(recipe.read("imagenet/vig_t.yaml", settings=["optimizer.lr=1"]))
    assert recipe.differences(tree, other) == ["optimizer.lr=1.0 (was 0.001)"]


def test_what_is_no_yaml_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {name: [unclosed\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML of sections: .* in line 2$"):
        recipe.read(str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match=r"--set 'model\.name=\[unclosed': the value is not YAML: .*$") as refusal:
        recipe.parse_override("model.name=[unclosed")
    assert "\n" not in str(refusal.value)

"""Runs of reduced models: fewer tokens, the methods' own losses, weights, and the commands that read such runs."""

import csv
import json

import pytest
import timm
import torch
import yaml
from small_runs import CPU, batch, begin, make, run

from visionmix import reduction
from visionmix.reduction.backbones import ReducedBackbone
from visionmix.tools import checkpoint, models, predict, recipe, step_cost, train, validate

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}


def vit(spec, **more):
    return {"name": "vit_tiny_patch16_224", "kwargs": SMALL, "reduction": spec, **more}


@pytest.mark.parametrize("spec", ["tome:r=13", {"method": "tome", "r": 13}])
def test_a_run_trains_the_reduced_model(spec, monkeypatch):
    counts = []
    step = reduction.ToMe.step

    def count(self, block, tokens, index):
        tokens = step(self, block, tokens, index)
        counts.append(tokens.x.shape[1])
        return tokens

    trainer = begin(model=vit(spec))
    plain = begin(model=vit(None))
    assert isinstance(trainer.model, ReducedBackbone)
    assert not isinstance(plain.model, ReducedBackbone)
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    monkeypatch.setattr(reduction.ToMe, "step", count)
    expected = torch.nn.functional.cross_entropy(
        trainer.model(batch().images), batch().targets, label_smoothing=0.1
    ).item()
    assert counts == [65 - 13, 65 - 26]
    assert trainer._update(batch()).item() == pytest.approx(expected)
    assert counts[2:] == [65 - 13, 65 - 26]
    assert trainer.own_losses == {}
    assert plain._update(batch()).item() != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "names"),
    [("dynamicvit:keep_rate=0.5, layers=[1]", {"ratio"}), ("mctf:r=8", {"consistency"}), ("avit", {"ponder", "prior"})],
)
def test_the_losses_of_a_method_are_trained_and_logged(tree, spec, names):
    trainer = run(tree, 2, model=vit(spec))
    assert set(trainer.own_losses) == names
    assert all(value > 0 for value in trainer.own_losses.values())
    twin = begin(model=vit(spec))
    images, targets = batch().images, batch().targets
    torch.manual_seed(5)
    logits, own = twin.model.forward_train(images)
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1) + sum(own.values())
    torch.manual_seed(5)
    assert twin._update(batch()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_learned_predictors_reach_the_optimiser_and_change(tree):
    trainer = run(tree, 1, model=vit("dynamicvit:layers=[1]"))
    learned = dict(trainer.model.reduction.named_parameters())
    fresh = dict(begin(model=vit("dynamicvit:layers=[1]")).model.reduction.named_parameters())
    updated = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    assert learned
    assert all(id(value) in updated for value in learned.values())
    assert all(not torch.equal(value, fresh[name]) for name, value in learned.items())


def test_pretrained_weights_are_in_the_reduced_model_whole(tmp_path, tree):
    torch.manual_seed(0)
    given = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    torch.save(given.state_dict(), tmp_path / "given.pth")
    overlay = {"file": str(tmp_path / "given.pth"), "num_classes": 3, "custom_load": False}
    options = {"pretrained": True, "kwargs": SMALL | {"pretrained_cfg_overlay": overlay}}
    for spec in ("tome:r=13", "dynamicvit:layers=[1]"):
        trainer = begin(model=vit(spec) | options)
        for name, value in given.state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], value), name
    state = given.state_dict()
    state["blocks.1.norm3.weight"] = state.pop("blocks.1.norm1.weight")
    torch.save(state, tmp_path / "given.pth")
    with pytest.raises((ValueError, RuntimeError), match=r"norm1|norm3"):
        begin(model=vit("tome:r=13") | options)


@pytest.fixture
def settings(tmp_path):
    """Write a recipe of a reduction and return its path."""

    def write(spec):
        sections = {
            "model": vit(spec),
            "data": {"image_size": 32, "batch_size": 6, "workers": 0, "crop_pct": 1.0},
            "optimizer": {"lr": 2e-3, "lr_batch": None},
            "schedule": {"epochs": 2, "warmup_epochs": 1},
            "train": {"ema_decay": 0.9},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
        return str(tmp_path / "run.yaml")

    return write


def test_commands_read_what_a_reduced_run_wrote(settings, tree, tmp_path, capsys):
    spec = {"method": "dynamicvit", "keep_rate": 0.5, "layers": [1]}
    out = tmp_path / "out"
    call = [settings(spec), "--data", str(tree), "--device", "cpu", "--output", str(out)]
    assert train.main([*call, "--set", "schedule.stop_epoch=1"]) == 0
    assert train.main([*call, "--resume", "--set", "schedule.stop_epoch=2"]) == 0
    with (out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss_ratio"]) > 0 for row in rows] == [True, True]
    best = max(rows, key=lambda row: float(row["test_top1"]))
    for file in (out / "best.safetensors", out / "checkpoints" / f"epoch_{int(best['epoch']):04d}"):
        trained = models.load_trained(str(file), device=CPU)
        assert trained.model.forward_tokens(torch.zeros(1, 3, 32, 32)).x.shape[1] == 1 + 32
        assert trained.recipe["model"]["reduction"] == spec
        state = checkpoint.weights(checkpoint.read(file))
        assert any(name.startswith("reduction.predictors.") for name in state)
        result = tmp_path / "result.json"
        assert (
            validate.main(["--checkpoint", str(file), "--device", "cpu", "--workers", "0", "--json", str(result)]) == 0
        )
        assert json.loads(result.read_text())["top1"] == pytest.approx(float(best["test_top1"]))
    guesses = tmp_path / "guesses.csv"
    call = [str(tree / "val"), "--checkpoint", str(out / "best.safetensors"), "--output", str(guesses)]
    assert predict.main([*call, "--device", "cpu", "--workers", "0"]) == 0
    assert len(guesses.read_text().splitlines()) == 1 + 9


def test_a_text_reaches_the_recipe_from_the_command_line(settings, tree, tmp_path):
    call = [settings({"method": "evit", "keep_rate": 0.5}), "--data", str(tree), "--output", str(tmp_path / "out")]
    for text in ("tome:r=13", "tome:r=(13, -1.0)", "evit:keep_rate=0.7, layers=[1]"):
        args = train.parser().parse_args([*call, "--set", f"model.reduction={text}"])
        made, _ = train.prepare(args, None)
        assert made.model.reduction == text
        assert recipe.from_dict(recipe.to_dict(made), "test") == made
    made, _ = train.prepare(train.parser().parse_args([*call, "--set", "model.reduction=null"]), None)
    assert made.model.reduction is None


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("tomme:r=3", ValueError, "did you mean 'tome'"),
        ("tome", ValueError, "r"),
        ("tome:rate=3", ValueError, "rate"),
        ("tome:3", ValueError, "write it as tome:r=13"),
        (13, TypeError, "13 is int"),
        ({"r": 13}, ValueError, "names no method"),
    ],
)
def test_mistakes_are_refused_before_any_work(spec, error, words):
    with pytest.raises(error, match=words) as caught:
        make(None, model={"reduction": spec})
    assert "test: model.reduction=" in str(caught.value)


def test_models_that_cannot_be_reduced_and_shards_are_refused():
    with pytest.raises(TypeError, match="class ResNet cannot be reduced"):
        begin(model={"name": "test_resnet", "reduction": "tome:r=3"})
    with pytest.raises(ValueError, match=r"does not go with train\.parallel=fsdp.*set it to ddp"):
        make(None, model=vit("tome:r=3"), train={"parallel": "fsdp"})


def test_a_plan_counts_the_reduced_step():
    def flops(spec):
        cost = step_cost.count(make(None, model=vit(spec)), 2, classes=3)
        return sum(call.flops for call in cost.forward)

    assert 0 < flops("tome:r=26") < 0.8 * flops(None)

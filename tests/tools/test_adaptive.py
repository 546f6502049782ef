"""Adaptive computation by recipe: three phases one after another, each from what the one before left."""

import csv
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

from visionmix import adaptive
from visionmix.tools import benchmark_adaptive, models, recipe, train

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs" / "adaptive"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SETTINGS = {
    "data": {"image_size": 32, "batch_size": 6, "workers": 0, "crop_pct": 1.0},
    "augment": {"scale": [0.8, 1.0], "color_jitter": 0.0},
    "optimizer": {"name": "adam", "lr": 5e-3, "lr_batch": None, "weight_decay": 0.0},
    "schedule": {"epochs": 3, "warmup_epochs": 0},
}


@pytest.fixture
def run(tree, tmp_path):
    """Train `model` in the folder `name`; return its best weights and the rows of its summary."""

    def _run(name: str, model: dict) -> tuple[Path, list[dict[str, str]]]:
        file, out = tmp_path / f"{name}.yaml", tmp_path / name
        file.write_text(yaml.safe_dump(SETTINGS | {"model": model}))
        assert train.main([str(file), "--data", str(tree), "--device", "cpu", "--output", str(out)]) == 0
        with (out / "summary.csv").open() as table:
            return out / "best.safetensors", list(csv.DictReader(table))

    return _run


def test_three_phases_one_after_another(run, capsys):
    weights, _ = run("base", {"name": "vit_tiny_patch16_224", "kwargs": VIT})
    overlay = {"file": str(weights), "num_classes": 3}
    kwargs = {"base": "vit_tiny_patch16_224", "base_options": VIT, "pretrained_cfg_overlay": overlay, "learners": 3}
    rows = {}
    for phase, options in (("distill", {}), ("route", {}), ("finetune", {"budget": 0.4, "budget_weight": 1.0})):
        start = {} if phase == "distill" else {"start": str(weights)}
        made = {"name": "acm", "pretrained": True, "kwargs": kwargs | start | options | {"phase": phase}}
        weights, rows[phase] = run(phase, made)
    for phase, loss in (("distill", "distillation"), ("route", "routing"), ("finetune", "budget")):
        assert float(rows[phase][-1][f"loss_{loss}"]) < float(rows[phase][0][f"loss_{loss}"])
    assert {"loss_entropy", "loss_diversity"} <= rows["finetune"][0].keys()
    weights.parent.joinpath("..", "route", "best.safetensors").unlink()  # what a phase began with is needed no more
    trained = models.load_trained(str(weights), device=CPU)
    assert trained.classes == ["blue", "green", "red"]
    plain = adaptive.convert(timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT), 3).eval()
    plain.load_state_dict(trained.model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(images), trained.model(images))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"phase": "warm"}, ValueError, "phase='warm'"),
        ({"phase": "route", "pretrained": True}, ValueError, "start=None: phase 'route' goes on from a file"),
        ({"phase": "distill", "pretrained": True, "start": "a.pth"}, ValueError, "takes no start"),
        ({"phase": "route", "pretrained": True, "start": "a.pth"}, FileNotFoundError, "start='a.pth' is no file"),
        ({"phase": "finetune"}, TypeError, "budget is missing"),
        ({"phase": "distill", "learner": 3}, TypeError, "learner"),
    ],
)
def test_mistakes_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        timm.create_model("acm", base="vit_tiny_patch16_224", base_options=VIT, **options)


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save({"head.bias": torch.zeros(3)}, tmp_path / "other.pth")
    weights = timm.create_model("vit_tiny_patch16_224", **VIT).state_dict()
    options = {
        "phase": "route",
        "start": str(tmp_path / "other.pth"),
        "pretrained_cfg_overlay": {"state_dict": weights},
    }
    with pytest.raises(ValueError, match="holds another model"):
        timm.create_model("acm", pretrained=True, base="vit_tiny_patch16_224", base_options=VIT, **options)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_recipes_make_their_models(name):
    made = recipe.read(str(CONFIGS / f"{name}.yaml"))
    assert (made.model.name, made.model.pretrained) == ("acm", True)
    small = {"base": "vit_tiny_patch16_224", "base_options": VIT}
    model = timm.create_model(made.model.name, **made.model.kwargs | small)
    assert model.phase == made.model.kwargs["phase"]
    assert timm.is_model(made.model.kwargs["base"])


@pytest.mark.parametrize(("first", "share"), [(0, 0.5), (1, 0.5), (0, 0.2), (1, 0.9)])
def test_the_benchmarks_gates_use_the_share(first, share):
    torch.manual_seed(0)
    module = adaptive.ACM(8, 8, 2, 4, min_learners=first).eval()
    x = torch.randn(2, 500, 8)
    benchmark_adaptive.set_gate(module, x, share)
    counts = module.gating_network(x)
    assert counts.double().mean().item() / 4 == pytest.approx(share, abs=0.01)
    assert counts.unique().tolist() == list(range(first, 5))


def test_the_benchmark_prints_a_row_a_conversion(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_adaptive.timing, "wait_until_quiet", lambda: None)
    name = "test_vit"
    options = ["--batch", "2", "--rounds", "1", "--threads", "1", "--share", "0.6"]
    assert benchmark_adaptive.main([name, *options]) == 0
    text = capsys.readouterr().out
    assert "plain" in text
    shares = re.findall(r"│ +(0\.\d{3}) +│", text)  # to a token of the images, which are drawn at random
    assert len(shares) == len(benchmark_adaptive.LAYERS)
    assert all(abs(float(share) - 0.6) < 0.02 for share in shares)

"""Mamba-R: where its registers stand, what its head makes of them, and checkpoints of it."""

from functools import partial

import golden
import numpy as np
import pytest
import timm
import torch

from visionmix import reduction
from visionmix.models import load_checkpoint
from visionmix.models.mambar import RegisterHead

SIZES = {"in_features": 12, "num_classes": 5, "count": 3, "place": "evenly"}


def published_orders():
    with np.load(golden.FOLDER / "scan_orders_8x8.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files if key.startswith("mambareg")}


@pytest.mark.parametrize(("rows", "columns", "count"), [(14, 14, 12), (8, 8, 3), (12, 16, 12)])
def test_registers_stand_where_the_published_code_puts_them(rows, columns, count):
    place = {"count": count, "place": "evenly"}
    model = timm.create_model("test_mambar_tiny", prefix_tokens=place).eval()
    x, grid = model.embed(torch.randn(1, 3, 16 * rows, 16 * columns))
    orders = published_orders()
    key = f"{rows}x{columns}_{count}"
    assert grid.prefix_positions == orders[f"mambareg_cls_positions_{key}"].tolist()
    registers = (model.class_token.weight + model.class_token.pos_embed)[0]
    cells = [index for index in range(x.shape[1]) if index not in grid.prefix_positions]
    assert torch.equal(x[0, grid.prefix_positions], registers)
    rest = torch.cat([x[0, cells], registers])
    assert torch.equal(x[0], rest[torch.from_numpy(orders[f"mambareg_token_idx_{key}"])])


@pytest.mark.parametrize("reduce", [1, 2, 6])
def test_the_head_reads_all_registers(reduce):
    torch.manual_seed(0)
    head = RegisterHead(**SIZES, reduce=reduce).double()
    x = torch.randn(2, 11, 12, dtype=torch.float64)  # a register behind every two of the eight cells
    registers = x[:, [2, 5, 8]]
    if reduce > 1:
        torch.nn.init.uniform_(head.norm.weight, 0.5, 2.0)
        registers = registers @ head.neck.weight.T
        vector = registers.flatten(1)
        vector = vector / (vector.square().mean(1, keepdim=True) + 1e-5).sqrt() * head.norm.weight
    else:
        vector = registers.flatten(1)
    assert head.hidden_size == 36 // reduce
    assert torch.allclose(head(x, pre_logits=True), vector)
    assert torch.allclose(head(x), vector @ head.fc.weight.T + head.fc.bias)


def test_other_poolings_read_the_cells():
    torch.manual_seed(0)
    options = {"head_layer": partial(RegisterHead, reduce=2)}
    model = timm.create_model("test_mambar_tiny", num_classes=5, **options).eval()
    images = torch.randn(2, 3, 64, 96)
    assert model.head_hidden_size == model.get_classifier().in_features == 64
    cells = model.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    for pool, pooled in {"avg": cells.mean(1), "max": cells.amax(1), "": model.forward_features(images)}.items():
        model.reset_classifier(3, pool)
        assert model.head_hidden_size == model.get_classifier().in_features == 32
        assert torch.allclose(model(images), model.head.fc(pooled), atol=1e-6)
        built = timm.create_model("test_mambar_tiny", num_classes=0, global_pool=pool, **options).eval()
        built.load_state_dict(model.state_dict(), strict=False)
        assert built.head_hidden_size == 32
        assert torch.allclose(built(images), pooled, atol=1e-6)
    model.reset_classifier(3, "token")
    assert model.head_hidden_size == model.get_classifier().in_features == 64
    assert model(images).shape == (2, 3)


def test_a_pruned_model_takes_a_classifier_again():
    model = timm.create_model("test_mambar_tiny")
    model.prune_intermediate_layers(1)
    model.reset_classifier(3, "token")
    assert model.get_classifier().in_features == 4 * 32
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("reduce", [0, -2, 5])
def test_reduce_must_divide_the_width(reduce):
    with pytest.raises(ValueError, match=f"reduce={reduce} does not divide in_features=12"):
        RegisterHead(**SIZES, reduce=reduce)


def test_mambar_loads_at_another_size():
    tensors = golden.state_dict(golden.load("mambar_tiny")[0])
    options = {"num_classes": 10, "in_chans": 1}
    natural = timm.create_model("mambar_tiny", **options).eval()
    built = timm.create_model("mambar_tiny", img_size=(96, 128), **options).eval()
    later = timm.create_model("mambar_tiny", **options).eval()
    for model in (natural, built, later):
        load_checkpoint(model, tensors)
        model.head.fc.load_state_dict(natural.head.fc.state_dict())
    later.set_input_size((96, 128))
    image = golden.image(96, 128, channels=1)
    with torch.no_grad():
        assert torch.allclose(natural(image), built(image), atol=1e-5)
        assert torch.allclose(natural(image), later(image), atol=1e-5)
    assert torch.equal(natural.class_token.pos_embed, tensors["pos_embed_cls"])


@pytest.mark.parametrize(("method", "options", "error", "message"), [
    ("ssm_prune", {}, ValueError, "knows one class token; this model has 4"),
    ("evit", {}, TypeError, "is not softmax attention"),
    ("tome", {"r": 2}, TypeError, "is not softmax attention"),
])  # fmt: skip
def test_reductions_that_do_not_know_registers_say_so(method, options, error, message):
    with pytest.raises(error, match=message):
        reduction.apply(timm.create_model("test_mambar_tiny"), method, **options)

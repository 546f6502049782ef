"""The FLatten models: how their files differ from them, and the layouts of their stages."""

import golden
import pytest
import timm
import torch

from visionmix.models import load_checkpoint


@pytest.fixture(scope="module")
def tensors():
    return golden.state_dict(golden.load("flatten_pvt_tiny")[0])


def load(tensors, name="flatten_pvt_tiny", **options):
    model = timm.create_model(name, **options)
    load_checkpoint(model, tensors)
    return model


def test_queries_keys_and_values_come_from_two_layers(tensors):
    loaded = load(tensors).state_dict()
    parts = [tensors[f"block3.1.attn.{layer}.weight"] for layer in ("q", "kv")]
    assert torch.equal(loaded["stages.2.blocks.1.mixer.qkv.weight"], torch.cat(parts))
    del (lacking := dict(tensors))["block3.1.attn.kv.weight"]
    with pytest.raises(ValueError, match=r"not flatten_pvt_tiny's.*missing: stages\.2\.blocks\.1\.mixer\.qkv\.weight"):
        load(lacking)


def test_the_norm_that_pvt_never_calls_may_be_there_or_not(tensors):
    expected = load(tensors).state_dict()
    again = load({key: value for key, value in tensors.items() if not key.startswith("norm.")}).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.items())


def test_a_file_fits_another_built_size(tensors):
    model = load(tensors, img_size=(192, 256)).eval()
    assert model.stages[0].blocks[0].mixer.pos_embed.weight.shape == (1, 48, 64, 64)
    image = golden.image(192, 256)
    with torch.no_grad():
        # Resampled once, or at every call: the same.
        assert torch.allclose(model(image), load(tensors).eval()(image), atol=1e-4)


@pytest.mark.parametrize(("name", "counts"), [
    ("flatten_pvt_large", [3, 8, 27, 3]),
    ("flatten_pvt_v2_b3", [3, 4, 18, 3]),
    ("flatten_cswin_small", [2, 4, 0, 0]),
    ("flatten_cswin_base", [3, 6, 0, 0]),
])  # fmt: skip
def test_stages_with_focused_attention(name, counts):
    with torch.device("meta"):
        model = timm.create_model(name)
    focused = [sum(hasattr(block.mixer, "focus") for block in stage.blocks) for stage in model.stages]
    assert focused == counts


@pytest.mark.parametrize(("img_size", "split_size"), [(128, 4), (192, 6), (224, 7), (384, 12), ((192, 256), 6)])
def test_stripes_of_cswin(img_size, split_size):
    with torch.device("meta"):
        model = timm.create_model("flatten_cswin_tiny", img_size=img_size)
    assert {block.mixer.split_size for block in model.stages[2].blocks} == {split_size}
    assert not model.stages[3].blocks[0].mixer.has_stripes

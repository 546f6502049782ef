"""The names that `visionmix.list_models` gives, and what a model's cfg says for its card."""

import re

import pytest
import timm

import visionmix
from visionmix.models.family import variant_of

NAMES = visionmix.models.list_family_models()


def test_only_models_of_this_library_are_listed():
    assert visionmix.list_models() == sorted(visionmix.list_models(), key=timm.list_models().index)
    assert set(visionmix.list_models()) == set(NAMES)
    assert "resnet18" in timm.list_models()
    found = visionmix.list_models("v*mamba_*", exclude_filters="*_v0")
    assert {"vmamba_tiny", "vmamba_base"} <= set(found)
    assert all(re.fullmatch(r"v.*mamba_.*", name) and not name.endswith("_v0") for name in found)
    assert visionmix.list_models("nothing_like_it*") == []


def test_pretrained_lists_weights_that_can_be_fetched():
    names = visionmix.list_models("vig*", pretrained=True)
    assert "vig_s.in1k" in visionmix.list_models("vig*", include_tags=True)
    assert all(timm.get_pretrained_cfg(name).has_weights for name in names)
    bare = {name.partition(".")[0] for name in visionmix.list_models(pretrained=True)}
    assert bare < set(NAMES)
    assert not any(name.startswith("test_") for name in bare)


@pytest.mark.parametrize("name", visionmix.list_models(include_tags=True, exclude_filters=["pyramid*", "plain_*"]))
def test_cfg_names_paper_licence_and_origin(name):
    cfg = timm.get_pretrained_cfg(name)
    if cfg.paper_ids is None:
        pytest.skip("a skeleton of this library has no paper")
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", cfg.paper_ids)
    assert cfg.paper_name
    assert cfg.license
    weights = variant_of(name).weights.get(cfg.tag)
    if weights and weights.url.startswith("https://github.com/"):
        assert re.fullmatch(r"https://github\.com/[^/]+/[^/]+", cfg.origin_url)
        assert weights.url.startswith(cfg.origin_url + "/") or weights.page == cfg.origin_url
    if weights and weights.hf_hub_id and not weights.page:
        assert cfg.origin_url == f"https://huggingface.co/{weights.hf_hub_id}"

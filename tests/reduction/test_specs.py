"""Reductions as recipes and command lines write them."""

import pytest
import timm
import torch

from visionmix import reduction
from visionmix.reduction.specs import read_spec


@pytest.mark.parametrize(
    ("spec", "method", "options"),
    [
        ("tome:r=13", "tome", {"r": 13}),
        ("tome:r=(13, -1.0)", "tome", {"r": (13, -1.0)}),
        ("evit:keep_rate=0.5, layers=[1]", "evit", {"keep_rate": 0.5, "layers": [1]}),
        ("ats", "ats", {}),
        ({"method": "tome", "r": 13}, "tome", {"r": 13}),
        ({"method": "avit"}, "avit", {}),
    ],
)
def test_a_text_or_a_mapping_is_a_method_and_its_options(spec, method, options):
    assert read_spec(spec) == (method, options)


@pytest.mark.parametrize("spec", ["tome:13", "tome:r=open", "tome:r=1)+(", "tome:**{'r': 1}"])
def test_reductions_that_cannot_be_read_are_refused(spec):
    with pytest.raises(ValueError, match=r"cannot be read .*; write it as tome:r=13"):
        read_spec(spec)


def test_reductions_of_another_type_or_without_a_method_are_refused():
    with pytest.raises(TypeError, match=r"the reduction 13 is int; give a text such as tome:r=13, or a mapping"):
        read_spec(13)
    with pytest.raises(ValueError, match=r"names no method; write \{\"method\": \"tome\""):
        read_spec({"r": 13})


def test_apply_takes_a_text_or_a_mapping_and_options_over_it():
    model = timm.create_model("test_vit").eval()
    expected = reduction.apply(model, "tome", r=13)(torch.ones(1, 3, 160, 160))
    for spec, options in (("tome:r=13", {}), ({"method": "tome", "r": 13}, {}), ("tome:r=2", {"r": 13})):
        fast = reduction.apply(model, spec, **options)
        assert torch.equal(fast(torch.ones(1, 3, 160, 160)), expected)
        assert fast.reduction.r == (13,) * len(model.blocks)


def test_a_pair_may_be_a_list_as_yaml_writes_it():
    model = timm.create_model("test_vit")
    pair = reduction.apply(model, "tome", r=(4, -1.0)).reduction.r
    assert len(set(pair)) > 1
    assert reduction.apply(model, "tome", r=[4, -1.0]).reduction.r == pair
    assert reduction.apply(model, "tome", r=[4, 1]).reduction.r[:2] == (4, 1)

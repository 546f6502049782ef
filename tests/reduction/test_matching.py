"""Bipartite soft matching against its definition."""

import pytest
import torch
from naive_reduction import merge_groups

from visionmix.reduction import match

SIZES = [(7, 2, 0), (8, 3, 1), (9, 4, 2), (33, 5, 1), (33, 16, 3), (20, 9, 5), (2, 1, 0), (3, 1, 1)]


@pytest.mark.parametrize(("tokens", "r", "prefix"), SIZES)
def test_matching_equals_definition(tokens, r, prefix):
    torch.manual_seed(tokens)
    metric, x = torch.randn(3, tokens, 6), torch.randn(3, tokens, 5)
    size = torch.rand(3, tokens, 1) + 0.5
    merge, unmerge = match(metric, r, prefix)
    for image in range(3):
        groups = merge_groups(metric[image], r, prefix)
        old, weight = x[image], size[image]
        plain = torch.stack([old[group].mean(0) for group in groups])
        weighted = torch.stack([(old[group] * weight[group]).sum(0) / weight[group].sum() for group in groups])
        torch.testing.assert_close(merge(x)[image], plain)
        torch.testing.assert_close(merge(x, size)[image], weighted)
        sums = torch.stack([weight[group].sum(0) for group in groups])
        torch.testing.assert_close(merge(size, mode="sum")[image], sums)
        back = unmerge(merge(x))[image]
        for token, group in enumerate(groups):
            assert all(torch.equal(back[member], merge(x)[image, token]) for member in group)


def test_more_than_half_is_lowered_to_half():
    metric = torch.randn(2, 12, 4)
    assert match(metric, 99, 1)[0](metric).shape == (2, 7, 4)
    assert match(metric, 99)[0](metric).shape == (2, 6, 4)


@pytest.mark.parametrize(("tokens", "r", "prefix"), [(9, 0, 1), (2, 1, 1), (1, 3, 0)])
def test_nothing_to_merge_leaves_all(tokens, r, prefix):
    x = torch.randn(2, tokens, 4)
    merge, unmerge = match(x, r, prefix)
    assert torch.equal(merge(x), x)
    assert torch.equal(unmerge(x), x)


def test_equal_similarities_go_by_position():
    metric = torch.ones(1, 10, 3)
    x = torch.arange(10.0).view(1, 10, 1)
    merged = match(metric, 2)[0](x).flatten().tolist()
    assert merged == [4, 6, 8, (0 + 2 + 1) / 3, 3, 5, 7, 9]


def test_gradients_reach_the_tokens_and_not_the_metric():
    metric = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 9, 1, dtype=torch.float64) + 1
    merge, unmerge = match(metric, 3, 1)
    assert torch.autograd.gradcheck(lambda x: unmerge(merge(x, size)), x)
    merge(x).sum().backward()
    assert metric.grad is None


def test_half_precision_is_matched_in_float32():
    metric = torch.randn(2, 40, 16).bfloat16()
    x = torch.arange(40.0).view(1, 40, 1).expand(2, -1, -1)
    with torch.autocast("cpu"):
        merged = match(metric, 12, 1)[0](x)
    torch.testing.assert_close(merged, match(metric.float(), 12, 1)[0](x))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.randn(2, 9, 4), -1), ValueError, "r=-1"),
        ((torch.randn(2, 9, 4), 2.0), TypeError, r"r=2\.0"),
        ((torch.randn(2, 9, 4), True), TypeError, "r=True"),
        ((torch.randn(9, 4), 1), ValueError, r"\(9, 4\)"),
        ((torch.ones(2, 9, 4, dtype=torch.int64), 1), ValueError, "int64"),
        ((torch.randn(2, 9, 4), 1, -2), ValueError, "num_prefix_tokens=-2"),
        ((torch.randn(2, 9, 4), 1, 1.5), TypeError, r"num_prefix_tokens=1\.5"),
        ((3, 1), TypeError, "metric is of type int"),
    ],
)
def test_bad_input_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        match(*arguments)


def test_unknown_mode_is_refused():
    metric = torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match="mode='max'"):
        match(metric, 1)[0](metric, mode="max")


@pytest.mark.parametrize("shape", [(2, 12, 4), (2, 8, 4), (3, 9, 4), (9, 4)])
def test_other_tokens_than_those_matched_are_refused(shape):
    merge, unmerge = match(torch.randn(2, 9, 4), 2)
    with pytest.raises(ValueError, match=r"^x has shape .*\(batch=2, tokens=9, channels\)"):
        merge(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^y has shape .*\(batch=2, tokens=7, channels\)"):
        unmerge(torch.zeros(shape))

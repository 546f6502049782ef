"""The filters over Spatial-Mamba's states against their definition."""

import pytest
import torch
from tolerance import assert_close, assert_gradients_close, gradients
from torch.nn import functional as F

import visionmix
from visionmix.kernels.dilated_filters import dilated_filters_op


def definition(x, filters, dilations):
    """Each filter on the map with the border's cells repeated around it, one dilation after another."""
    out = torch.zeros_like(x)
    for weight, dilation in zip(filters, dilations, strict=True):
        around = F.pad(x.permute(0, 3, 1, 2), [dilation] * 4, mode="replicate").permute(0, 2, 3, 1)
        for row in range(3):
            for column in range(3):
                below, right = row * dilation, column * dilation
                seen = around[:, below : below + x.shape[1], right : right + x.shape[2]]
                out = out + weight[:, row, column] * seen
    return out


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (7, 3)])
def test_dilated_filters(size):
    x, filters = torch.randn(2, *size, 3, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
    inputs = [x.requires_grad_(), filters.requires_grad_()]
    ours, expected = dilated_filters_op(*inputs, [1, 3]), definition(*inputs, [1, 3])
    assert_close(ours, expected)
    assert_gradients_close(gradients(ours, inputs), gradients(expected, inputs))
    with visionmix.kernels.use("reference"):
        assert torch.equal(dilated_filters_op(*inputs, [1, 3]), ours)


def test_dilated_filters_keep_float32_under_autocast():
    x, filters = 1e5 * torch.randn(1, 4, 5, 3), torch.randn(2, 3, 3, 3)
    expected = definition(x.double(), filters.double(), [1, 2])
    with torch.autocast("cpu", torch.float16):
        assert_close(dilated_filters_op(x, filters, [1, 2]), expected)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # AOT autograd takes 5 seconds
    torch.library.opcheck(torch.ops.visionmix.dilated_filters, (x, filters.requires_grad_(), [1, 2]), test_utils=checks)

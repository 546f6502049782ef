"""ViTDet's pyramid of one map, by its formulas."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmengine", reason="OpenMMLab is not installed; run: sh tools/install_openmmlab.sh")

from visionmix.integrations.pyramid import SimplePyramid


def norm(x, layer):
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), layer.weight, layer.bias, 1e-6).movedim(-1, 1)


def test_the_pyramid_is_made_of_the_last_map():
    torch.manual_seed(0)
    pyramid = SimplePyramid(8, 12)
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8, 6, 4)
    with torch.no_grad():
        found = pyramid([torch.randn(2, 5, 3, 3), x])
        first, second, _, _ = pyramid.resize
        four = first[3](F.gelu(norm(first[0](x), first[1])))
        pooled = x.unflatten(2, (3, 2)).unflatten(4, (2, 2)).amax((3, 5))
        for level, convs, map_ in zip((four, second(x), x, pooled), pyramid.convs, found, strict=False):
            one, norm_one, three, norm_three = convs
            expected = norm(F.conv2d(level, one.weight), norm_one)
            torch.testing.assert_close(map_, norm(F.conv2d(expected, three.weight, padding=1), norm_three))
    assert [tuple(map_.shape) for map_ in found] == [
        (2, 12, 24, 16), (2, 12, 12, 8), (2, 12, 6, 4), (2, 12, 3, 2), (2, 12, 2, 1),
    ]  # fmt: skip
    assert torch.equal(found[4], found[3][..., ::2, ::2])

"""Attention in stripes against its definition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionmix import create_mixer


def cross_window(**options):
    torch.manual_seed(0)
    mixer = create_mixer("cross_window", 12, num_heads=4, **options).double()
    for value in mixer.parameters():
        nn.init.normal_(value, std=0.3)
    return mixer


def defined(mixer, x):
    """The definition: stripes are cut from a padded map one by one, each attended in and convolved by itself."""
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    _, height, width, dim = x.shape
    size, half = mixer.split_size, dim // 2

    def window(*qkv, conv):
        rows, columns, channels = qkv[0].shape
        q, k, v = (each.flatten(0, 1).unflatten(-1, (mixer.heads, -1)).transpose(0, 1) for each in qkv)
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        y = y.transpose(0, 1).reshape(rows, columns, channels)
        return y + conv(qkv[2].permute(2, 0, 1)[None])[0].permute(1, 2, 0)

    if not mixer.has_stripes:
        return mixer.proj(torch.stack([window(*each, conv=mixer.conv) for each in zip(q, k, v, strict=True)]))
    above, left = (-height % size) // 2, (-width % size) // 2
    images = []
    for each in zip(q, k, v, strict=True):
        down = [F.pad(part, [0, 0, 0, 0, above, -height % size - above])[..., half:] for part in each]
        across = [F.pad(part, [0, 0, left, -width % size - left])[..., :half] for part in each]
        rows = zip(*(part.split(size, dim=0) for part in down), strict=True)
        columns = zip(*(part.split(size, dim=1) for part in across), strict=True)
        horizontal = torch.cat([window(*stripe, conv=mixer.horizontal_conv) for stripe in rows], dim=0)
        vertical = torch.cat([window(*stripe, conv=mixer.conv) for stripe in columns], dim=1)
        images.append(torch.cat([vertical[:, left : left + width], horizontal[above : above + height]], dim=-1))
    return mixer.proj(torch.stack(images))


@pytest.mark.parametrize("split_size", [1, 2, 3, 7, None])
@pytest.mark.parametrize("grid", [(6, 9), (5, 7), (1, 1), (8, 4)])
def test_cross_window_equals_definition(grid, split_size):
    mixer = cross_window(split_size=split_size)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


@pytest.mark.long
def test_one_compiled_graph_serves_one_stripe_and_many():
    mixer = create_mixer("cross_window", 12, num_heads=2, split_size=3).eval()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for grid in [(2, 3), (6, 4), (8, 9)]:
            x = torch.randn(5, *grid, 12)
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert torch.allclose(compiled(x), mixer(x), atol=1e-6)


def test_a_half_has_half_of_the_heads_and_at_least_one():
    assert create_mixer("cross_window", 12, num_heads=4).heads == 2
    assert create_mixer("cross_window", 12, num_heads=1).heads == 1
    assert create_mixer("cross_window", 12, num_heads=7).heads == 3
    assert create_mixer("cross_window", 16, num_heads=7).heads == 4
    assert create_mixer("cross_window", 12, num_heads=4, split_size=None).heads == 4


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 8}, "num_heads=8 does not divide the 6 channels of a half in 4 heads"),
    ({"num_heads": 5, "split_size": None}, "num_heads=5 does not divide dim=12"),
    ({"split_size": 0}, "split_size=0 is too small"),
])  # fmt: skip
def test_cross_window_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("cross_window", 12, **options)

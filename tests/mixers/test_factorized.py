"""FaViT's mixer against its definition, window by window."""

from functools import partial

import pytest
import torch
from drawn import check_half_precision
from torch.nn import functional as F

from visionmix import create_mixer


def drawn(**options):
    torch.manual_seed(0)
    mixer = create_mixer("factorized", 16, num_heads=1, window_size=3, **options)
    for value in mixer.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return mixer


def attention(q, k, v):
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def convolved(conv, x):
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mirrored(place, length):
    """A place beyond the end, mirrored about the last one; beyond the mirrored axis, the first."""
    return place if place < length else max(2 * (length - 1) - place, 0)


def mean_of_windows(x, dilation, heads, published):
    """The mean of windows of 3x3 places (batch, heads, 9, head_dim)."""
    _, height, width, _ = x.shape
    x, span = x.unflatten(-1, (heads, -1)), 2 * dilation + 1
    corners = [(i, j) for i in range(0, height, span) for j in range(0, width, span)]
    places = []
    for row in range(3):
        for column in range(3):
            cells = [
                x[:, mirrored(i + row * dilation, height), mirrored(j + column * dilation, width)] for i, j in corners
            ]
            places.append(torch.stack(cells, 2))  # (batch, heads, windows, head_dim)
    windows = torch.stack(places, 2)
    if not published:
        return windows.mean(3)
    return F.adaptive_avg_pool2d(windows.flatten(3), (None, windows.shape[4]))


def defined(mixer, x, heads=1, ratio=1, published=False):
    _, height, width, dim = x.shape
    first, group = (dim // 16 * 2, dim // 16 * 7) if ratio > 1 else (dim // 8, dim // 8 * 7)
    q = mixer.query(x).flatten(1, 2)
    around = F.pad(x[..., :first], [0, 0, 0, max(0, ratio - width), 0, max(0, ratio - height)])
    smaller = F.layer_norm(convolved(mixer.sr, around), (first,), mixer.sr_norm.weight, mixer.sr_norm.bias)
    k, v = mixer.sr_kv(smaller).chunk(2, -1)
    v = v + convolved(mixer.lepe, v)
    outs = [attention(q[..., :first], k.flatten(1, 2), v.flatten(1, 2))]
    y = mixer.local_proj(convolved(mixer.local_conv, x[..., first:]))
    queries = q[..., first:].unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, heads, tokens, both groups)
    for number, each in enumerate(mixer.groups):
        mean = mean_of_windows(y[..., group * number : group * (number + 1)], (1, ratio)[number], heads, published)
        k, v = each.kv(each.fc(mean)).chunk(2, -1)
        cells = v.transpose(1, 2).flatten(2).unflatten(1, (3, 3))
        v = v + convolved(each.lepe, cells).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
        part = queries[..., group // heads * number : group // heads * (number + 1)]
        outs.append(attention(part, k, v).transpose(1, 2).flatten(2))
    return mixer.proj(torch.cat(outs, -1)).view_as(x)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("heads", "ratio"), [(1, 1), (7, 1), (7, 2), (1, 3)])
@pytest.mark.parametrize("grid", [(8, 6), (5, 13), (1, 3), (1, 1)], ids=str)
def test_equals_definition(grid, heads, ratio, published):
    torch.manual_seed(0)
    options = {"num_heads": heads, "sr_ratio": ratio, "window_size": 3, "published_mean": published}
    mixer = create_mixer("factorized", 32, **options).double()
    for value in mixer.parameters():
        torch.nn.init.normal_(value, std=0.3)
    x = torch.randn(2, *grid, 32, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), defined(mixer, x, heads, ratio, published)
    assert torch.allclose(out, expected, atol=1e-10)
    leaves, grad = [x, *mixer.parameters()], torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(each, leaves, grad) for each in (out, expected)), strict=True)
    assert all(torch.allclose(own, other, rtol=1e-6, atol=1e-8) for own, other in pairs)


def test_kept_windows_serve_training():
    mixer, x = drawn(), torch.randn(2, 4, 29, 16)  # a size that no other test has made
    with torch.inference_mode():
        mixer(x)
    out, expected = mixer(x), defined(mixer, x)
    assert torch.allclose(out, expected, atol=1e-5)
    leaves = [*mixer.parameters()]
    pairs = zip(*(torch.autograd.grad(each, leaves, out.detach()) for each in (out, expected)), strict=True)
    assert all(torch.allclose(own, other, rtol=1e-3, atol=1e-4) for own, other in pairs)


def test_the_published_mean_mixes_channels_with_windows():
    mixer = drawn().eval()
    x = torch.randn(1, 3, 3, 16)
    published = create_mixer("factorized", 16, num_heads=1, window_size=3, published_mean=True).eval()
    published.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        assert torch.allclose(published(x), mixer(x), atol=1e-6)  # of one window
        x = torch.randn(1, 6, 3, 16)
        assert (published(x) - mixer(x)).abs().max() > 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, autocast):
    check_half_precision(drawn(sr_ratio=2), torch.randn(1, 6, 7, 16), partial(defined, ratio=2), dtype, autocast)


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (12, {}, r"dim=12 cannot be divided in the ratio \[1, 7\]; give a multiple of 8"),
        (24, {"sr_ratio": 2}, r"dim=24 cannot be divided in the ratio \[2, 7, 7\]; give a multiple of 16"),
        (16, {"num_heads": 3}, "num_heads=3 does not divide a group's 14 channels"),
        (16, {"num_heads": 0}, "num_heads=0 does not divide"),
        (16, {"sr_ratio": 0}, "sr_ratio=0 is too small"),
        (16, {"window_size": 0}, "window_size=0 is too small"),
    ],
)
def test_options_that_do_not_fit_are_refused(dim, options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("factorized", dim, **options)

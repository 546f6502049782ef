"""Softmax-free attention against its definition, landmark by landmark, and its inverse against the published code's."""

from functools import partial

import golden
import pytest
import torch
from drawn import check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.mixers.softmax_free import kernel_inverse, newton_inverse

soft = partial(drawn_mixer, "softmax_free", num_heads=3)


def newton(kernel, step, iterations=20):
    inverse = step * kernel
    for _ in range(iterations):
        inverse = 2 * inverse - inverse @ kernel @ inverse
    return inverse


def published_inverse(kernels, normalised):
    """The published iterations for (images, heads, n, n); SOFT++'s have one step size."""
    if not normalised:
        steps = 1.8 / kernels.sum(-1).amax(-1)[..., None, None] ** 2
        return newton(kernels + 0.01 * torch.eye(kernels.shape[-1]), steps)
    step = 2 / kernels.sum(-1).max() ** 2
    for _ in range(10):
        if (torch.eye(kernels.shape[-1]) - step * kernels @ kernels).abs().sum(-2).max() > 1.01:
            step = step / 2
    root = kernels.sum(-1).rsqrt()
    return root[..., :, None] * newton(kernels, step) * root[..., None, :]


def kernel(a, b):
    return torch.stack([torch.stack([torch.exp(-((x - y) ** 2).sum() / 2) for y in b]) for x in a])


def defined(mixer, x):
    """The definition, for one cell and one landmark at a time; every image has a step size of its own."""
    side, heads = mixer.sr_ratio, mixer.num_heads
    rows, columns = max(x.shape[1] // side, 1), max(x.shape[2] // side, 1)
    q, v = F.linear(x, mixer.qv.weight, mixer.qv.bias).chunk(2, dim=-1)
    images = []
    for image in range(len(x)):
        parts, inner = [], []
        for channels in torch.arange(x.shape[-1]).chunk(heads):
            a = q[image][..., channels] / len(channels) ** 0.25
            whole = F.pad(a, (0, 0, 0, max(0, side - a.shape[1]), 0, max(0, side - a.shape[0])))
            marks = [
                sum(
                    mixer.landmark_conv.weight[:, :, i, j] @ whole[side * row + i, side * column + j]
                    for i in range(side)
                    for j in range(side)
                )
                for row in range(rows)
                for column in range(columns)
            ]
            norm = mixer.landmark_norm
            marks = F.gelu(F.layer_norm(torch.stack(marks), (len(channels),), norm.weight, norm.bias, 1e-5))
            parts.append((kernel(a.flatten(0, 1), marks), v[image][..., channels].flatten(0, 1)))
            inner.append(kernel(marks, marks))
        inverses = published_inverse(torch.stack(inner)[None], mixer.normalised)[0]
        mixed = torch.cat([k @ r @ k.T @ each for (k, each), r in zip(parts, inverses, strict=True)], dim=-1)
        taps = mixer.conv.weight.repeat_interleave(x.shape[-1] // heads, dim=0)
        local = F.conv2d(v[image].permute(2, 0, 1), taps, padding="same", groups=x.shape[-1]).permute(1, 2, 0)
        images.append(mixer.proj(mixed.reshape(local.shape) + local))
    return torch.stack(images)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("options", "grid"), [({}, (5, 7)), ({"sr_ratio": 3, "kernel_size": 5}, (7, 6))])
def test_softmax_free_equals_definition(options, grid, normalised):
    mixer = soft(**options, normalised=normalised).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-10)


def test_a_map_smaller_than_a_landmarks_square_is_padded():
    mixer = soft(sr_ratio=4, normalised=False).double()
    x = torch.randn(2, 2, 3, 12, dtype=torch.float64)
    assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-12)


def test_inverse_equals_the_published():
    """On kernels of two images whose step sizes differ, so that SOFT++'s published result is of both."""
    _, arrays = golden.load("unit_soft_newton")
    kernels = torch.from_numpy(arrays["kernel"])
    for normalised, name, bound in ((False, "soft", 1e-8), (True, "softpp_normalised", 1e-12)):
        # The published 0.01 of SOFT is rounded to float32: 5e-9.
        made = kernel_inverse(kernels, normalised, normalised, 20)
        assert golden.relative_error(made, arrays[name]) <= bound
    alone = kernel_inverse(kernels[1:], True, True, 20)
    assert golden.relative_error(alone, arrays["softpp_normalised"][1:]) > 0.1


def test_an_image_has_a_step_size_of_its_own():
    kernels = torch.from_numpy(golden.load("unit_soft_newton")[1]["kernel"])
    both = kernel_inverse(kernels, True, False, 20)
    for image in range(2):
        alone = kernel_inverse(kernels[image : image + 1], True, True, 20)
        assert torch.allclose(both[image : image + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("landmarks", [1, 2, 9])
def test_iteration_does_not_stand_still_where_row_sums_are_equal(landmarks):
    """One landmark, or equal ones: the inverse of the kernel on the space that it spans.

    Rounding beside that space grows a million times, so float32 is only held to the row sums.
    """
    ones = torch.ones(1, 1, landmarks, landmarks)
    assert torch.allclose(kernel_inverse(ones, True, False, 20).sum(-1), ones[0, 0, 0] / landmarks**2, rtol=1e-4)
    made = kernel_inverse(ones.double(), True, False, 20)
    assert torch.allclose(made, ones.double() / landmarks**3, rtol=1e-6)
    assert kernel_inverse(torch.ones(1, 1, 1, 1), True, True, 20) == 0  # as published


def test_gradient_is_that_of_the_inverse():
    torch.manual_seed(0)
    points = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.exp(-(torch.cdist(points, points) ** 2) / 2) + 0.3 * torch.eye(6)
    step = 1.8 / matrix.detach().sum(-1).amax() ** 2
    weights = torch.randn_like(matrix)
    made, expected = newton_inverse(matrix, step, 20), torch.linalg.inv(matrix)
    assert torch.allclose(made, expected, atol=1e-8)
    grads = [torch.autograd.grad((each * weights).sum(), points, retain_graph=True)[0] for each in (made, expected)]
    assert torch.allclose(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
def test_softmax_free_in_half_precision(normalised, dtype, autocast):
    """With landmarks far apart, so that the inverse does not enlarge the rounding of what goes into it."""
    mixer = soft(normalised=normalised)
    with torch.no_grad():
        mixer.landmark_norm.weight.fill_(3.0)
    torch.manual_seed(1)
    check_half_precision(mixer, torch.randn(2, 4, 5, 12), lambda made, x: made(x), dtype, autocast)


def test_bad_options_are_refused():
    for options, message in (
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ({"sr_ratio": 0}, "sr_ratio=0 is too small"),
        ({"iterations": 0}, "iterations=0 is too small"),
        ({"kernel_size": 4}, "kernel_size=4 has no middle"),
        ({"normalised": False, "published_step": True}, "published_step=True is a step of SOFT\\+\\+ alone"),
    ):
        with pytest.raises(ValueError, match=message):
            create_mixer("softmax_free", 12, **options)

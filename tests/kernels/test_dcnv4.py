"""Deformable convolution against what its published code computes, and against its definition cell by cell."""

import math

import golden
import pytest
import torch
from tolerance import assert_close, assert_gradients_close, gradients

import visionmix
from visionmix.kernels.dcnv4 import dcnv4

META, ARRAYS = golden.load("op_dcnv4")
KEYS = ("group", "offset_scale", "stride", "pad", "dilation")


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", META["cases"], ids=lambda case: str(case["case"]))
def test_the_published_op(case, dtype, implementation):
    def array(name):
        return ARRAYS[f"case{case['case']}_{name}"]

    x, offset_mask = (torch.from_numpy(array(name)).to(dtype).requires_grad_() for name in ("x", "offset_mask"))
    with visionmix.kernels.use(implementation):
        out = dcnv4(x, offset_mask, kernel_size=case["kernel"], **{key: case[key] for key in KEYS})
        (out * torch.from_numpy(array("w"))).sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert golden.relative_error(out, array("out")) <= bound
    assert golden.relative_error(x.grad, array("dx")) <= bound
    assert golden.relative_error(offset_mask.grad, array("doffset_mask")) <= bound


def definition(x, offset_mask, group, kernel_size=3, stride=1, pad=1, dilation=1, offset_scale=1.0):
    """The sum tap by tap, in float64."""
    batch, height, width, channels = x.shape
    _, rows, columns, _ = offset_mask.shape
    taps, middle = kernel_size**2, dilation * (kernel_size - 1) // 2
    parts = x.unflatten(3, (group, channels // group))
    out = []
    for n in range(batch):
        for r in range(rows):
            for c in range(columns):
                for g in range(group):
                    given = offset_mask[n, r, c, 3 * taps * g : 3 * taps * (g + 1)]
                    value = 0 * parts[n, 0, 0, g] + 0 * given.sum()
                    for tap in range(taps):
                        i, j = divmod(tap, kernel_size)
                        y = r * stride + middle - pad + (j * dilation - middle + given[2 * tap + 1]) * offset_scale
                        z = c * stride + middle - pad + (i * dilation - middle + given[2 * tap]) * offset_scale
                        if not (-1 < y < height and -1 < z < width):
                            continue
                        top, left = math.floor(y.detach()), math.floor(z.detach())
                        for a in (0, 1):
                            for b in (0, 1):
                                if 0 <= top + a < height and 0 <= left + b < width:
                                    near = (y - top if a else 1 - y + top) * (z - left if b else 1 - z + left)
                                    value = value + given[2 * taps + tap] * near * parts[n, top + a, left + b, g]
                    out.append(value)
    return torch.stack(out).reshape(batch, rows, columns, channels)


def drawn(rows, columns, channels=6, features=54, height=None, width=None, scale=2.0):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, height or rows, width or columns, channels, generator=generator, dtype=torch.float64)
    offset_mask = scale * torch.randn(2, rows, columns, features, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), offset_mask.requires_grad_()


def agrees(inputs, *arguments, **options):
    ours, expected = dcnv4(*inputs, *arguments, **options), definition(*inputs, *arguments, **options)
    assert_close(ours, expected)
    assert_gradients_close(gradients(ours, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (3, 4)])
def test_the_definition(size):
    agrees(drawn(*size), 2)


def test_the_definition_of_another_kernel_step_and_scale():
    agrees(drawn(2, 3, features=80, height=5, width=7), 3, kernel_size=2, stride=2, pad=0, offset_scale=0.7)
    agrees(drawn(3, 4, channels=4, features=27), 1, pad=2, dilation=2, offset_scale=1.5)
    agrees(drawn(3, 2, channels=4, features=4, height=3, width=2), 1, kernel_size=1, pad=0)


def test_places_on_cells_and_far_outside():
    """Offsets of 0, as fresh layers have them, ask for cells; those on the first row beyond the border have none."""
    x, offset_mask = drawn(3, 4, channels=2, features=27)
    with torch.no_grad():
        offset_mask[..., :18] = 0
        offset_mask[1, ..., :18] = torch.tensor([1e9, -3.0, float(2**31)], dtype=torch.float64).repeat(6)
    agrees((x, offset_mask), 1)


def test_strides_of_the_inputs_do_not_matter():
    x, offset_mask = drawn(5, 3)
    expected = dcnv4(x, offset_mask, 2)
    strided = [each.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for each in (x, offset_mask)]
    assert torch.equal(dcnv4(*strided, 2), expected)
    assert torch.equal(dcnv4(x.detach()[:1].expand(3, -1, -1, -1), offset_mask[:1].expand(3, -1, -1, -1), 2)[2],
                       expected[0])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, offset_mask = (each.detach().to(dtype) for each in drawn(5, 4))
    out = dcnv4(x, offset_mask, 2)
    assert out.dtype == dtype
    assert torch.equal(out, dcnv4(x.float(), offset_mask.float(), 2).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert dcnv4(x.float(), offset_mask.float(), 2).dtype == torch.float32


def test_second_derivatives_and_vmap_under_the_reference():
    inputs = drawn(1, 2, channels=2, features=12, height=2, width=3, scale=0.3)

    def small(*inputs):
        return dcnv4(*inputs, 1, kernel_size=2, pad=0)

    with visionmix.kernels.use("reference"):
        assert torch.autograd.gradgradcheck(small, inputs)
        batched = torch.vmap(small)(*(each.unsqueeze(1) for each in inputs))
    assert torch.allclose(batched.squeeze(1), small(*inputs))


@pytest.mark.long
def test_opcheck():
    torch.library.opcheck(torch.ops.visionmix.dcnv4, (*drawn(3, 4), 2, 3, 1, 1, 1, 1.0))


def test_no_image():
    x, offset_mask = drawn(3, 4)
    assert dcnv4(x[:0], offset_mask[:0], 2).shape == (0, 3, 4, 6)


@pytest.mark.parametrize(("change", "message"), [
    ({"group": 4}, "group=4 does not divide the 6 channels"),
    ({"group": 0}, "group=0 is too small; give 1 or more"),
    ({"pad": -1}, "pad=-1 is too small; give 0 or more"),
    ({"group": 3}, "read 81 features"),
    ({"pad": 0}, r"ask for \(batch=2, rows=1, columns=2, features=54\)"),
    ({"dilation": 4}, "does not fit a map of 3x4; enlarge pad"),
    ({"x": torch.zeros(2, 3, 4, 6, dtype=torch.int64)}, "convert it to a floating-point dtype"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    x, offset_mask = drawn(3, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        dcnv4(**{"x": x, "offset_mask": offset_mask, "group": 2} | change)

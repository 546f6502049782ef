"""Retention: three forms of one function."""

import copy

import pytest
import torch
from drawn import drawn_mixer

from visionmix import create_mixer
from visionmix.layers import Grid

VIR = {"decays": (5, 9), "head_norm": False}


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("options", [{}, VIR], ids=["normed", "vir"])
def test_forms_agree(length, dtype, bound, options):
    chunked = drawn_mixer("retention", num_heads=3, **options).to(dtype)
    parallel = create_mixer("retention", 12, num_heads=3, form="parallel", **options).to(dtype)
    parallel.load_state_dict(chunked.state_dict())
    x = torch.randn(2, 1, length, 12, dtype=dtype)
    with torch.no_grad():
        expected = parallel(x)
        steps, state = [], None
        for token in x[:, 0].unbind(1):
            out, state = chunked.step(token, state)
            steps.append(out)
    for out in (chunked(x), torch.stack(steps, dim=1).unsqueeze(1)):
        assert (out - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "exponents"),
    [({}, [5, 6, 7]), (VIR, [5, 7, 9]), ({"num_heads": 1} | VIR, [5]), ({"decays": (1, 2), "num_heads": 2}, [1, 2])],
    ids=str,
)
@pytest.mark.parametrize("form", ["chunked", "parallel"])
def test_retention_equals_definition(form, options, exponents):
    mixer = drawn_mixer("retention", form=form, **options).double()
    count, width = len(exponents), 12 // len(exponents)
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    q, k, v = mixer.qkv(x.flatten(1, 2)[0]).unflatten(-1, (3, count, width)).unbind(1)
    rows = []
    for n in range(12):
        heads = []
        for h, exponent in enumerate(exponents):
            gamma = 1 - 2.0**-exponent
            y = sum(gamma ** (n - m) * (q[n, h] @ k[m, h]) * width**-0.5 * v[m, h] for m in range(n + 1))
            heads.append(mixer.norm(y))
        rows.append(mixer.proj(torch.cat(heads)))
    assert torch.allclose(mixer(x).flatten(1, 2)[0], torch.stack(rows), atol=1e-12)


def test_last_class_token_sees_the_map_and_no_cell_sees_it():
    mixer = drawn_mixer("retention", num_heads=3)
    x = torch.randn(1, 13, 12)
    out = mixer.forward_tokens(x, Grid(3, 4, [12], None))
    assert torch.allclose(out[:, :12], mixer(x[:, :12].unflatten(1, (3, 4))).flatten(1, 2), atol=1e-5)
    assert not torch.allclose(out[:, 12], mixer.forward_tokens(x[:, 12:], Grid(1, 1, [], None))[:, 0], atol=1e-2)


def test_retention_names_mistakes():
    with pytest.raises(ValueError, match="form='recurent' is unknown; give one of 'chunked', 'parallel'"):
        create_mixer("retention", 12, form="recurent")
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=12"):
        create_mixer("retention", 12, num_heads=5)
    for decays in ((5,), (0, 5), (5, 7, 9), 5):
        with pytest.raises(ValueError, match=r"decays=.* are not two positive numbers; give \(5, 9\)"):
            create_mixer("retention", 12, num_heads=3, decays=decays)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_retention_without_a_norm_in_half_precision(dtype):
    """Sums over the sequence outgrow float16 before the projection, and fit behind it."""
    mixer = drawn_mixer("retention", num_heads=3, std=0.02, **VIR).to(dtype)
    x = (300 * torch.randn(2, 9, 12, 12)).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(mixer).double()(x.double())
        out = mixer(x)
    assert out.isfinite().all()
    assert (out.double() - expected).norm() <= 5 * torch.finfo(dtype).eps * expected.norm()

"""Re-WKV against its definition, cell by cell."""

from functools import partial

import pytest
import torch
from drawn import check_definition, check_half_precision, drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer
from visionmix.layers import ChannelMix, OmniShift

recurrent_wkv = partial(drawn_mixer, "recurrent_wkv")


def shifted(layer, x):
    """The definition: four maps in their proportions."""
    x = x.permute(0, 3, 1, 2)
    y = layer.alpha[0] * x
    for index, weight in enumerate((layer.weight1, layer.weight3, layer.weight5), 1):
        y = y + layer.alpha[index] * F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return y.permute(0, 2, 3, 1)


def averaged(k, v, decay, bonus):
    """The definition, on sequences (batch, tokens, dim): every token weighs every other."""
    place = torch.arange(k.shape[1])
    distance = (place[:, None] - place).abs()[..., None]
    weights = torch.where(distance == 0, k[:, None] + bonus, k[:, None] - (distance - 1) * decay).exp()
    return (weights * v[:, None]).sum(2) / weights.sum(2)


def defined(mixer, x):
    _, height, width, _ = x.shape
    x = shifted(mixer.shift, x)
    k, v = mixer.key(x), mixer.value(x)
    for index in range(mixer.recurrences):
        if index % 2:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        scaled = mixer.decay[index] / (height * width), mixer.bonus[index] / (height * width)
        v = averaged(k.flatten(1, 2), v.flatten(1, 2), *scaled).reshape(v.shape)
        if index % 2:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
    return mixer.proj(mixer.receptance(x).sigmoid() * v)


@pytest.mark.parametrize("recurrences", [1, 2, 3])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 1)])
def test_recurrent_wkv_equals_definition(grid, recurrences):
    mixer = recurrent_wkv(std=1.0, recurrences=recurrences).double()
    check_definition(mixer, defined, (2, *grid, 12))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_decays_and_large_keys(dtype, autocast):
    mixer = recurrent_wkv()
    with torch.no_grad():
        mixer.decay[0, :4], mixer.decay[1, 4:8] = 30.0, -30.0
        mixer.key.weight[:2] *= 20
    check_half_precision(mixer, torch.randn(1, 24, 24, 12), defined, dtype, autocast)


def test_omni_shift_equals_definition():
    layer = OmniShift(6, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), shifted(layer, x), atol=1e-12)


def test_channel_mix_equals_definition():
    torch.manual_seed(0)
    layer = ChannelMix(6, mlp_ratio=2, dtype=torch.float64)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    y = shifted(layer.shift, x)
    hidden = (y @ layer.key.weight.T).relu() ** 2
    assert torch.allclose(layer(x), (y @ layer.receptance.weight.T).sigmoid() * (hidden @ layer.value.weight.T))


@pytest.mark.parametrize("autocast", [False, True])
def test_channel_mix_squares_more_than_float16_holds(autocast):
    torch.manual_seed(0)
    layer, x = ChannelMix(12), 300 * torch.randn(1, 5, 5, 12)
    with torch.no_grad():
        layer.value.weight *= 1e-3
        expected = layer(x)
        layer = layer if autocast else layer.half()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            out = layer(x if autocast else x.half())
    assert (out - expected).abs().max() <= 0.02 * expected.abs().max()


def test_no_recurrence_is_refused():
    with pytest.raises(ValueError, match="recurrences=0 averages no values"):
        create_mixer("recurrent_wkv", 12, recurrences=0)

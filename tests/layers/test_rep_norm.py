"""Batch norms beside an identity, alone and after layer norms, and folded away."""

import copy
import pickle

import pytest
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from visionmix.layers import BatchNorm, LinearNorm, RepBN
from visionmix.layers.fold import ChannelAffine, affine_of, fold_before, fold_behind

NORMS = [BatchNorm, RepBN, LinearNorm]


def drawn(layer, dtype=torch.float64):
    """Return `layer` with parameters and statistics of its own."""
    torch.manual_seed(0)
    for value in layer.parameters():
        nn.init.normal_(value, std=0.7)
    for name, value in layer.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(value)
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2.0)
    return layer.to(dtype)


def rep_bn(norm, x, training=False):
    """The definition of a `RepBN`, channel by channel."""
    out = torch.empty_like(x)
    for channel in range(x.shape[-1]):
        part = x[..., channel]
        mean, variance = norm.bn.running_mean[channel], norm.bn.running_var[channel]
        if training:
            mean, variance = part.mean(), part.var(unbiased=False)
        y = (part - mean) / (variance + 1e-5).sqrt() * norm.bn.weight[channel] + norm.bn.bias[channel]
        out[..., channel] = y + norm.alpha * part
    return out


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 7, 4), (2, 1, 1, 4), (6, 4, 2)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_rep_bn_is_a_batch_norm_plus_alpha_times_the_input(shape, training):
    norm = drawn(RepBN(shape[-1])).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    expected = rep_bn(norm, x, training)
    assert torch.allclose(norm(x), expected, atol=1e-12)
    if training:
        flat = x.flatten(0, -2)
        assert norm.bn.num_batches_tracked == 1
        before = drawn(RepBN(shape[-1])).bn.running_mean
        assert torch.allclose(norm.bn.running_mean, 0.9 * before + 0.1 * flat.mean(dim=0))


def test_a_map_whose_channels_lie_first_in_memory():
    norm = drawn(RepBN(4)).eval()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64).permute(0, 2, 3, 1)
    assert torch.equal(norm(x), norm(x.contiguous()))


@pytest.mark.parametrize(("done", "part"), [(0, 1.0), (0.1, 0.75), (0.3, 0.25), (0.4, 0.0), (0.7, 0.0), (1, 0.0)])
def test_linear_norm_fades_from_layer_norm_to_rep_bn(done, part):
    norm = drawn(LinearNorm(4, share=0.4, eps=1e-3))
    norm.set_progress(done)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    layer = F.layer_norm(x, (4,), norm.norm1.weight, norm.norm1.bias, 1e-3)
    expected = part * layer + (1 - part) * rep_bn(norm.norm2, x, training=True)
    out = norm.train()(x)
    assert torch.allclose(out, expected, atol=1e-12)
    out.square().sum().backward()
    assert all(value.grad is not None for value in norm.parameters())
    assert bool(norm.norm1.weight.grad.any()) == (part > 0)
    assert bool(norm.norm2.bn.weight.grad.any()) == (part < 1)
    assert torch.equal(norm.eval()(x), norm.norm2(x))


def test_linear_norm_without_progress_or_share_is_a_rep_bn():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    untold, without = drawn(LinearNorm(4)), drawn(LinearNorm(4, share=0))
    without.set_progress(0)
    for norm in (untold, without):
        assert torch.allclose(norm(x), rep_bn(norm.norm2, x, training=True), atol=1e-12)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share={share}"):
            LinearNorm(4, share=share)


def test_copies_and_pickles_stand_where_the_original_does_and_files_do_not_say():
    norm = LinearNorm(4)
    norm.set_progress(0.04)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm.double()):
        assert other.layer_norm_part == 0.75
    published = {"norm1.weight", "norm1.bias", "norm2.alpha"} | {
        f"norm2.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert norm.state_dict().keys() == published


def test_one_compiled_graph_serves_the_whole_schedule():
    torch._dynamo.reset()
    counters.clear()
    norm = drawn(LinearNorm(4))
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    for done in (0, 0.04, 0.08, 1):
        norm.set_progress(done)
        assert torch.allclose(compiled(x), norm(x), atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("make", NORMS)
def test_sync_batch_norm_sees_channels(make):
    norm = drawn(make(4)).eval()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = norm(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    assert any(type(module) is nn.SyncBatchNorm for module in converted.modules())
    assert torch.equal(converted(x), expected)
    assert torch.allclose(ChannelAffine(*affine_of(converted))(x), expected, atol=1e-12)


@pytest.mark.parametrize("make", NORMS)
def test_norms_fuse_to_one_affine_map_per_channel(make):
    norm = drawn(make(4)).eval()
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    folded = reparameterize_model(nn.Sequential(norm))
    assert type(folded[0]) is ChannelAffine
    assert torch.allclose(folded(x), norm(x), atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [*NORMS, nn.BatchNorm1d])
def test_norm_folds_into_the_linear_layer_after_it(make, bias):
    norm, linear = drawn(make(4)).eval(), drawn(nn.Linear(4, 6, bias=bias))
    x = torch.randn(5, 4, dtype=torch.float64).unsqueeze(1)
    x = x.squeeze(1) if make is nn.BatchNorm1d else x
    expected = linear(norm(x))
    assert type(fold_before(norm, linear)) is nn.Identity
    assert torch.allclose(linear(x), expected, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [*NORMS, nn.BatchNorm2d])
def test_norm_folds_into_the_convolution_before_it(make, bias):
    norm, conv = drawn(make(6)).eval(), drawn(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    y = conv(x)
    expected = norm(y) if make is nn.BatchNorm2d else norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert type(fold_behind(conv, norm)) is nn.Identity
    assert torch.allclose(conv(x), expected, atol=1e-12)


def test_norms_that_cannot_fold_exactly_stay():
    linear, norm = nn.Linear(4, 6), RepBN(4)
    before = linear.weight.clone()
    layer_norm, without = nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)
    for each in (layer_norm, without, nn.GroupNorm(2, 4)):
        assert fold_before(each, linear) is each
    assert fold_before(norm, None) is norm
    assert fold_behind(nn.ConvTranspose2d(4, 4, 2), norm) is norm
    assert torch.equal(linear.weight, before)


def test_half_precision_stays_half():
    norm, linear = drawn(RepBN(4), torch.bfloat16).eval(), drawn(nn.Linear(4, 6, bias=False), torch.bfloat16)
    assert {value.dtype for value in reparameterize_model(nn.Sequential(norm)).parameters()} == {torch.bfloat16}
    fold_before(norm, linear)
    assert linear.weight.dtype == linear.bias.dtype == torch.bfloat16

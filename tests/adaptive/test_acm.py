"""The adaptive computation module against its definition, the published code, and itself in other types."""

import copy

import golden
import pytest
import torch
from accelerator import DEVICES
from tolerance import assert_close, assert_gradients_close, gradients
from torch.nn import functional as F

from visionmix import adaptive


def made(**options) -> adaptive.ACM:
    torch.manual_seed(0)
    acm = adaptive.ACM(12, 10, 6, 3, **{"out_bias": True, "dtype": torch.float64} | options)
    with torch.no_grad():
        for parameter in acm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return acm.eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*(shape or (2, 9)), 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(acm: adaptive.ACM, token: torch.Tensor, count: int) -> torch.Tensor:
    """h_count of one token, learner by learner."""
    h, d = acm.learner_dim, acm.out_features
    out = acm.b2[:d].clone() if acm.b2 is not None else torch.zeros(d, dtype=token.dtype)
    for i in range(count):
        units = slice(i * h, (i + 1) * h)
        hidden = token @ acm.w1[:, units]
        if acm.b1 is not None:
            hidden = hidden + acm.b1[units]
        out = out + acm.act(hidden) @ acm.w2[units]
        if acm.b2 is not None:
            out = out + acm.b2[(i + 1) * d : (i + 2) * d]
    return out


BIASES = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(("hidden_bias", "out_bias"), BIASES)
def test_acm_equals_definition(hidden_bias, out_bias):
    acm, x = made(hidden_bias=hidden_bias, out_bias=out_bias), tokens(2, 3, 4)
    counts = acm.gating_network(x)
    assert counts.unique().numel() > 2
    expected = torch.stack([by_definition(acm, t, k) for t, k in zip(x.view(-1, 12), counts.view(-1), strict=True)])
    assert_close(acm(x), expected.view(2, 3, 4, 10))
    prefixes = acm.prefixes(x)
    assert prefixes.shape == (2, 3, 4, 4, 10)
    for count in range(4):
        each = torch.stack([by_definition(acm, t, count) for t in x.view(-1, 12)]).view(2, 3, 4, 10)
        assert_close(prefixes[..., count, :], each)
        assert_close(acm.first(x, count), each)
        acm.learners = count
        assert_close(acm(x), each)
        acm.learners = None


@pytest.mark.parametrize("counts", [[0] * 5, [3] * 5, [2] * 5, [0, 3, 0, 3, 3], [3, 2, 1, 0, 1]])
def test_grouped_equals_masked_with_gradients(counts):
    acm, x = made(), tokens(1, 5).requires_grad_()
    counts = torch.tensor([counts])
    parameters = [acm.w1, acm.b1, acm.w2, acm.b2]
    grouped, masked = acm.grouped(x, counts), acm.masked(x, F.one_hot(counts, 4))
    assert_close(grouped, masked)
    assert_gradients_close(gradients(grouped, [x, *parameters]), gradients(masked, [x, *parameters]))


def test_no_tokens():
    assert made()(tokens(0, 5)).shape == (0, 5, 10)


def test_a_learner_that_no_token_uses_does_not_run():
    acm, x = made(), tokens()
    units = slice(2 * acm.learner_dim, None)
    with torch.no_grad():
        acm.w1[:, units] = torch.nan
        acm.w2[units] = torch.nan
    counts = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(0))
    assert acm.grouped(x, counts).isfinite().all()
    counts[1, 4] = 3
    assert not acm.grouped(x, counts)[1, 4].isfinite().any()
    assert acm.grouped(x, counts).isfinite().all(dim=-1).sum() == 17


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["acm_all", "acm_gated", "acm_gated_released"])
def test_acm_equals_the_published(name, device):
    """The released evaluation leaves out the learner whose number is the largest choice of the batch."""
    meta, arrays = golden.load(name)
    options, released = meta["kwargs"], name.endswith("released")
    dim, sizes = options["hidden_dim"], (options["block_dim"], options["num_blocks"])
    acm = adaptive.ACM(dim, dim, *sizes, out_bias=True, released=released)
    state = golden.state_dict(meta)
    acm.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    acm = acm.eval().to(device)
    x = golden.image(*meta["image_size"], batch=meta["batch"], seed=meta["seed"]).reshape(1, 16, 48).to(device)
    with torch.no_grad():
        out = acm.prefixes(x) if name == "acm_all" else acm(x)
    assert golden.relative_error(out, arrays["logits"]) <= 1e-5


def test_a_deeper_gate_has_the_published_keys():
    acm = adaptive.ACM(12, 12, 6, 3, gate_dims=(16, 16), min_learners=1)
    shapes = {name: tuple(value.shape) for name, value in acm.gating_network.state_dict().items()}
    assert shapes["net.0.weight"] == (16, 12)
    assert shapes["net.2.weight"] == (3, 16)
    assert acm.gating_network(tokens().float()).min() >= 1


def test_the_gate_learns_from_the_output_in_training():
    acm, x = made(min_learners=1).train(), tokens(4, 50)
    out = acm(x)
    acm.record = []
    torch.manual_seed(3)
    drawn = acm(x)
    gate = acm.record[0]
    assert torch.equal(gate.round().sum(-1), torch.ones(4, 50, dtype=torch.float64))
    assert (gate[..., 0] == 0).all()
    assert (gate.round().sum((0, 1))[1:] > 0).all()
    assert_close(drawn, acm.eval().grouped(x, gate.argmax(-1)))
    out.sum().backward()
    assert acm.gating_network.fc.weight.grad.abs().sum() > 0
    assert acm.gating_network.fc.weight.grad.isfinite().all()


def test_samples_follow_the_logits():
    acm = made(min_learners=1)
    x = tokens(1, 1).expand(1, 20000, 12)
    torch.manual_seed(0)
    share = acm.gating_network.sample(x).mean((0, 1))
    assert (share - acm.gating_network.logits(x)[0, 0].softmax(-1)).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision(dtype, training):
    acm, x = made().train(training), tokens()
    half = copy.deepcopy(acm).to(dtype)
    acm = half.double() if training else acm
    half = copy.deepcopy(half).to(dtype)
    counts = acm.gating_network(x)
    gate = F.one_hot(counts, 4)
    rounded = copy.deepcopy(half).double()
    out = half.masked(x.to(dtype), gate) if training else half.grouped(x.to(dtype), counts)
    assert out.dtype == dtype
    assert_close(out, rounded.masked(x.to(dtype).double(), gate), factor=4)


def test_autocast_and_a_batch_of_no_learners():
    acm, x = made(dtype=torch.float32), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert acm(x).dtype == torch.bfloat16
        assert acm.grouped(x, torch.zeros(2, 9, dtype=torch.int64)).dtype == torch.bfloat16
        assert acm.train()(x).dtype == torch.bfloat16


def test_images_do_not_depend_on_their_batch():
    acm, x = made(), tokens(5, 7)
    assert_close(acm(x)[2:3], acm(x[2:3]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_learners": 0}, ValueError, "num_learners=0: give 1 or more"),
        ({"learner_dim": 2.5}, TypeError, "learner_dim=2.5: give an int"),
        ({"min_learners": 4}, ValueError, "min_learners=4: give 0 to num_learners=3"),
        ({"min_learners": "1"}, TypeError, "min_choice='1'"),
        ({"gate_dims": 16}, TypeError, "hidden_dims=16: give a list"),
        ({"gate_dims": (0,)}, ValueError, r"hidden_dims=\(0,\): give widths above 0"),
        ({"temperature": 0}, ValueError, "temperature=0: give a number above 0"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    sizes = {"in_features": 12, "out_features": 12, "learner_dim": 6, "num_learners": 3}
    with pytest.raises(error, match=match):
        adaptive.ACM(**sizes | options)

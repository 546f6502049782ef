"""Methods of reduction against their definition, image by image and token by token, in float64."""

import naive_reduction
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from visionmix import reduction

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 4, "num_classes": 5}
HOSTS = {
    "class": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "average": {"class_token": False, "global_pool": "avg"},
}


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().double()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def embedded(model: VisionTransformer, batch: int = 2) -> torch.Tensor:
    return model._pos_embed(model.patch_embed(images(batch)))


@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"one_step_ahead": False}, {"tau_similarity": 0.5}])
@pytest.mark.parametrize("host", HOSTS)
def test_mctf_equals_its_definition(host, options):
    model = vit(**HOSTS[host])
    fast = reduction.apply(model, "mctf", r=5, trace_source=True, **options)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = fast.forward_tokens(images())
        for image, start in enumerate(embedded(model)):
            expected, members = naive_reduction.mctf(model, start, [0, 5, 5], **options)
            torch.testing.assert_close(tokens.x[image], model.norm(expected))
            assert tokens.size[image, :, 0].tolist() == [len(group) for group in members]
            for position, group in enumerate(members):
                cells = [token - prefix for token in group if token >= prefix]
                assert tokens.source[image, cells].tolist() == [position] * len(cells)


def test_fractions_and_limits_of_mctf():
    def left(**options):
        return reduction.apply(vit(), "mctf", **options).forward_features(images()).shape[1]

    assert left(r=0.25, layers=[0]) == 37 - 9
    assert left(r=1000, layers=[0]) == 37 - 18
    assert left(r=1000) == 10  # 37, 19, 10: no fewer are left
    assert left(r=0) == 37
    assert reduction.apply(vit(depth=12), "mctf_fast").forward_features(images()).shape[1] == 12
    assert reduction.apply(vit(), "mctf_fast").reduction.layers == [0, 1, 2]


@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("host", ["class", "registers"])
def test_ats_equals_its_definition(host, samples):
    """Images keep different numbers of tokens: the shorter one is padded, which its own tokens do not see."""
    model = vit(**HOSTS[host])
    fast = reduction.apply(model, "ats", layers=[0, 2], samples=samples, trace_source=True)
    with torch.no_grad():
        tokens = fast.forward_tokens(images(5))
        counts = []
        for image, start in enumerate(embedded(model, 5)):
            expected = model.norm(naive_reduction.ats(model, start, [0, 2], samples or 36))
            torch.testing.assert_close(tokens.x[image, : len(expected)], expected)
            assert tokens.mask[image].tolist() == [at < len(expected) for at in range(tokens.x.shape[1])]
            assert int((tokens.source[image] >= 0).sum()) == len(expected) - model.num_prefix_tokens
            counts.append(len(expected))
    if samples is None:
        assert len(set(counts)) > 1


def test_avit_equals_its_definition():
    model = vit()
    fast = reduction.apply(model, "avit", gate_scale=0.5, gate_center=0.2)
    with torch.no_grad():
        tokens = fast.forward_tokens(images())
        halted = set()
        for image, start in enumerate(embedded(model)):
            x, total, output = start, torch.zeros(37).double(), torch.zeros_like(start)
            ponder = torch.zeros(37).double()
            for index, block in enumerate(model.blocks):
                running = [token for token in range(37) if total[token] < 0.99]
                part = x[running].unsqueeze(0)
                part = part + block.attn(block.norm1(part))
                x = x.clone()
                x[running] = (part + block.mlp(block.norm2(part)))[0]
                for token in running:
                    score = torch.sigmoid(x[token, 0] * 0.5 - 0.2) if index < 2 else torch.tensor(1.0)
                    ponder[token] += 1
                    if total[token] + score < 0.99:
                        output[token] += score * x[token]
                    else:
                        output[token] += (1 - total[token]) * x[token]
                        ponder[token] += 1 - total[token]
                        halted.add(index)
                    total[token] += score
            torch.testing.assert_close(tokens.x[image], model.norm(output))
            torch.testing.assert_close(tokens.state["ponder"][image], ponder)
    assert halted == {1, 2} or halted == {0, 1, 2}


@pytest.mark.parametrize("host", [pytest.param("class", marks=pytest.mark.long), "registers"])
def test_zero_tprune_equals_its_definition(host):
    model = vit(**HOSTS[host], depth=12)
    prefix = model.num_prefix_tokens
    layers = {1: (30, 0.8), 5: (5, 0.7), 11: (1, 0.9)}
    options = {"layers": list(layers), "keep_rates": [rate for _, rate in layers.values()], "similar": 4}
    fast = reduction.apply(model, "zero_tprune", **options, trace_source=True)
    with torch.no_grad():
        tokens = fast.forward_tokens(images())
        for image, start in enumerate(embedded(model)):
            x, where = start, list(range(len(start)))
            for index, block in enumerate(model.blocks):
                mixed, weights, keys = naive_reduction.attention(block.attn, block.norm1(x), None)
                x = x + mixed
                x = x + block.mlp(block.norm2(x))
                if index in layers:
                    rounds, rate = layers[index]
                    kept = naive_reduction.zero_tprune(weights, keys.mean(0), rounds, 4, rate, prefix)
                    x, where = x[kept], [where[token] for token in kept]
            torch.testing.assert_close(tokens.x[image], model.norm(x))
            assert torch.nonzero(tokens.source[image] >= 0).flatten().tolist() == [at - prefix for at in where[prefix:]]


def test_operations_of_zero_tprune():
    """By default as many of DeiT-S's operations go as in the paper: 34.7 percent."""
    from fvcore.nn import FlopCountAnalysis

    model = timm.create_model("deit_small_patch16_224").eval()
    fast = reduction.apply(model, "zero_tprune")
    image = torch.randn(1, 3, 224, 224)
    counts = []
    for each in (model, fast):
        for block in each.blocks:
            block.attn.fused_attn = False
        analysis = FlopCountAnalysis(each, image)
        analysis.unsupported_ops_warnings(False)
        counts.append(analysis.total())
    assert 0.645 <= counts[1] / counts[0] <= 0.661


def test_dynamicvit_in_training_equals_its_definition():
    model = vit()
    torch.manual_seed(2)
    fast = reduction.apply(model, "dynamicvit", keep_rate=[0.5], layers=[1]).double().train()
    torch.manual_seed(3)
    logits, losses = fast.forward_train(images())
    torch.manual_seed(3)
    x = embedded(model)
    x = model.blocks[0](x)
    scores = fast.reduction.predictors[0](x[:, 1:])
    stays = torch.nn.functional.gumbel_softmax(scores, hard=True)[..., 0]
    torch.testing.assert_close(losses["ratio"], 2.0 * (stays.mean(1) - 0.5).square().mean())
    seen = torch.cat([torch.ones(2, 1).double(), stays], dim=1)
    visible = (seen[:, None, :] > 0.5) | torch.eye(37, dtype=torch.bool)
    bias = torch.zeros(2, 1, 37, 37).double().masked_fill(~visible.unsqueeze(1), -torch.inf)
    for block in model.blocks[1:]:
        layer = block.attn
        q, k, v = layer.qkv(block.norm1(x)).reshape(2, 37, 3, 4, 4).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(2, 3) / 2 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(logits, model.forward_head(model.norm(x)), atol=1e-4, rtol=1e-4)  # its epsilon is 1e-6
    assert 0 < stays.sum() < stays.numel()


def test_distillation_of_dynamicvit():
    """A student that keeps every token is its own teacher; the more it is changed, the larger are the divergences."""
    model, student = vit(), vit()
    fast = reduction.apply(student, "dynamicvit", keep_rate=1.0, teacher=model, ratio_weight=1.0).double().train()
    for predictor in fast.reduction.predictors:
        nn.init.zeros_(predictor.fc3.weight)
        predictor.fc3.bias.data = torch.tensor([100.0, -100.0]).double()
    found = []
    for change in (0.0, 0.01, 0.03):
        with torch.no_grad():
            student.blocks[1].mlp.fc1.weight += change * torch.sin(torch.arange(64.0)).unsqueeze(1)
        losses = fast.forward_train(images())[1]
        assert losses["ratio"] == 0
        found.append((losses["logits"].item(), losses["tokens"].item()))
    assert max(found[0]) < 1e-6
    assert found[0] < found[1] < found[2]
    assert not any("teacher" in name for name in fast.state_dict())


@pytest.mark.parametrize("options", [{"embed_dim": 8}, {"num_classes": 7}, {"patch_size": 8}])
def test_a_teacher_of_other_sizes_is_refused(options):
    fast = reduction.apply(vit(), "dynamicvit", teacher=vit(**options)).double().train()
    with pytest.raises(ValueError, match=r"teacher has \d+ tokens of .*; give a teacher of the model's patches"):
        fast.forward_train(images())


def test_losses_of_mctf():
    model = vit()
    losses = reduction.apply(model, "mctf", r=9).train().forward_train(images())[1]
    fast = reduction.apply(model, "mctf", r=9)
    distance = (fast.forward_features(images())[:, 0] - model.forward_features(images())[:, 0]).square().mean()
    torch.testing.assert_close(losses, {"consistency": distance})
    assert reduction.apply(model, "mctf", r=9, consistency_weight=0).forward_train(images())[1] == {}
    assert reduction.apply(model, "mctf", r=9, r_teacher=5).forward_train(images())[1]["consistency"] > 0


def test_losses_of_avit():
    model = vit()
    fast = reduction.apply(model, "avit", gate_scale=0.5, gate_center=0.2, ponder_weight=1.0, prior_weight=2.0)
    losses = fast.forward_train(images())[1]
    tokens = fast.forward_tokens(images())
    torch.testing.assert_close(losses["ponder"], tokens.state["ponder"].mean())
    scores = (tokens.state["scores"] / tokens.state["scores"].sum()).clamp(0.01, 0.99)
    normal = torch.distributions.Normal(2.0, 1.0).log_prob(torch.arange(3.0)).exp().double()
    target = normal * 0.98 / normal[:2].sum()
    expected = 2.0 * (target * (target / scores).log()).mean()
    torch.testing.assert_close(losses["prior"], expected)


@pytest.mark.parametrize("depth", [1, 24])
def test_losses_of_avit_in_models_of_any_depth(depth):
    """Far from the target its density is 0 in float32; before the first block there is none."""
    model = vit(depth=depth, embed_dim=8).float()
    fast = reduction.apply(model, "avit", gate_scale=0.5, gate_center=2.0).train()
    logits, losses = fast.forward_train(images().float())
    (logits.sum() + sum(losses.values())).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(value.grad.isfinite().all() for value in fast.parameters())


def test_methods_without_losses_have_no_training_pass():
    assert not hasattr(reduction.apply(vit(), "tome", r=1), "forward_train")
    assert hasattr(reduction.apply(vit(), "mctf", r=1), "forward_train")


@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.parametrize("r", [3, 1000])
def test_rmeeto_equals_its_definition(place, r):
    model = timm.create_model("test_vim_tiny", img_size=40, prefix_tokens=place).double().eval()
    fast = reduction.apply(model, "rmeeto", r=r, layers=[1], trace_source=True)
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        tokens = fast.forward_tokens(x)
        start, grid = model.embed(x)
        (where,) = grid.prefix_positions
        count = start.shape[1]
        first = model.blocks[0]
        branch = first.mixer.forward_tokens(first.norm1(start), grid)[0]
        t = (start + branch)[0]
        cells = [token for token in range(count) if token != where]
        even, odd = cells[::2], cells[1::2]
        like = {a: max((torch.cosine_similarity(branch[a], branch[b], 0).item(), -b) for b in odd) for a in even}
        away = {a: -like[a][1] for a in sorted(even, key=lambda a: -like[a][0])[: min(r, len(cells) // 2)]}
        groups = [[a, *(b for b in away if away[b] == a)] for a in cells if a not in away]
        new = int(where * (count - len(away)) / count)
        groups.insert(new, [where])
        merged = torch.stack([t[group].mean(0) for group in groups])
        assert tokens.prefix_positions == (new,)
        assert tokens.size[0, :, 0].tolist() == [len(group) for group in groups]
        for block in model.blocks[1:]:
            grid = grid._replace(prefix_positions=[new])
            merged = merged + block.mixer.forward_tokens(block.norm1(merged.unsqueeze(0)), grid)[0]
        torch.testing.assert_close(tokens.x[0], model.norm(merged))
        assert fast(x).isfinite().all()


@pytest.mark.parametrize("threshold", [0.1, 0.9, -1.0])
@pytest.mark.parametrize("host", HOSTS)
def test_algm_equals_its_definition(host, threshold):
    """Images merge different numbers of tokens: the shorter one is padded, which its own tokens do not see."""
    model = vit(**HOSTS[host], depth=4)
    fast = reduction.apply(model, "algm", layers=[0, 1, 3], threshold=threshold, trace_source=True)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        tokens = fast.forward_tokens(images(4))
        counts = set()
        for image, start in enumerate(embedded(model, 4)):
            expected, members = naive_reduction.algm(model, start, 6, [0, 1, 3], threshold)
            torch.testing.assert_close(tokens.x[image, : len(expected)], model.norm(expected))
            sizes = [len(group) for group in members]
            assert tokens.size[image, :, 0].tolist() == sizes + [0.0] * (tokens.x.shape[1] - len(sizes))
            for position, group in enumerate(members):
                cells = [token - prefix for token in group if token >= prefix]
                assert tokens.source[image, cells].tolist() == [position] * len(cells)
            counts.add(len(members))
    assert (len(counts) > 1) == (tokens.mask is not None)
    assert threshold != 0.1 or len(counts) > 1


def test_algm_as_released_merges_alike_in_all_images():
    fast = reduction.apply(vit(), "algm", layers=[0, 2], threshold=0.1, released=True)
    tokens = fast.forward_tokens(images(4))
    assert tokens.mask is None
    assert not torch.allclose(fast(images(4))[:1], fast(images(4)[:1]))
    assert torch.allclose(
        fast(images(4)[:1]), reduction.apply(vit(), "algm", layers=[0, 2], threshold=0.1)(images(4)[:1])
    )


def test_algm_on_maps_that_windows_do_not_fill():
    model = vit(dynamic_img_size=True)
    fast = reduction.apply(model, "algm", layers=[0, 2], threshold=-1.0)
    image = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    assert fast.forward_intermediates(image, [2], intermediates_only=True)[0].shape == (2, 16, 5, 7)
    assert fast(torch.randn(2, 3, 4, 4, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "error", "text"),
    [
        ("mctf", {"r": -1}, ValueError, "r=-1"),
        ("mctf", {"r": 2.5}, TypeError, r"r=2\.5"),
        ("mctf", {"r": "all"}, TypeError, "r='all'"),
        ("mctf", {"tau_size": 0}, ValueError, "tau_size=0"),
        ("mctf", {"layers": [3]}, ValueError, r"layers=\[3\]"),
        ("mctf_fast", {"tau_sise": 3}, ValueError, "did you mean 'tau_size'"),
        ("ats", {"samples": 1}, ValueError, "samples=1"),
        ("ats", {"samples": 0.5}, TypeError, r"samples=0\.5"),
        ("avit", {"gate_scale": -1.0}, ValueError, r"gate_scale=-1\.0"),
        ("avit", {"gate_center": "mean"}, TypeError, "gate_center='mean'"),
        ("avit", {"target_depth": 9}, ValueError, "target_depth=9"),
        ("avit", {"prior_weight": -1}, ValueError, "prior_weight=-1"),
        ("zero_tprune", {"variant": "2023"}, ValueError, "variant='2023'"),
        ("zero_tprune", {"similar": -1}, ValueError, "similar=-1"),
        ("zero_tprune", {"layers": [0, 1], "keep_rates": [0.5]}, ValueError, r"keep_rates=\[0\.5\] has 1 entries"),
        ("zero_tprune", {"keep_rates": "all"}, TypeError, "keep_rates='all'"),
        ("zero_tprune", {"layers": [0], "keep_rates": [0]}, ValueError, r"\(0, 1\]"),
        ("dynamicvit", {"keep_rate": 1.5}, ValueError, r"\(0, 1\]"),
        ("dynamicvit", {"keep_rate": [0.5]}, ValueError, "1 entries"),
        ("dynamicvit", {"teacher": nn.Linear(2, 2)}, TypeError, "teacher is a Linear"),
        ("dynamicvit", {"ratio_weight": -1}, ValueError, "ratio_weight=-1"),
        ("algm", {"threshold": 2}, ValueError, "threshold=2"),
        ("algm", {"window_size": 1}, ValueError, "window_size=1"),
        ("algm", {"window_size": 2.0}, TypeError, r"window_size=2\.0"),
        ("algm", {"layers": [7]}, ValueError, r"layers=\[7\]"),
        ("rmeeto", {}, TypeError, "bidirectional_mamba"),
        ("rmeeto", {"layers": [0]}, ValueError, r"layers=\[0\]"),
        ("rmeeto", {"r": 1.5}, TypeError, r"r=1\.5"),
    ],
)
def test_bad_options_are_refused(method, options, error, text):
    with pytest.raises(error, match=text):
        reduction.apply(vit(), method, **options)

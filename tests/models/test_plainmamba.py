"""PlainMamba: where its published code differs from its paper, its files, and its sizes."""

import golden
import pytest
import timm
import torch
from torch.nn import functional as F

import visionmix
from visionmix.models import load_checkpoint


@pytest.mark.parametrize(
    ("name", "published"), [("plainmamba_l1", 7.3), ("plainmamba_l2", 25.7), ("plainmamba_l3", 50.5)]
)
def test_parameters_without_the_classifier_are_the_published_cut_to_a_digit(name, published):
    with torch.device("meta"):
        params = sum(value.numel() for value in timm.create_model(name, num_classes=0).parameters())
    assert int(params / 1e5) / 10 == published


def test_the_averaging_hooks_copies_are_left_out():
    tensors = golden.state_dict(golden.load("plainmamba_l1")[0])
    copies = {"ema_" + key.replace(".", "_"): value for key, value in tensors.items()}
    model = timm.create_model("plainmamba_l1")
    load_checkpoint(model, tensors | copies)
    assert torch.equal(model.pos_embed.weight.flatten(1, 2), tensors["backbone.pos_embed"])


def test_only_the_smallest_models_first_block_ends_in_a_convolution():
    with torch.device("meta"):
        small, large = (timm.create_model(f"plainmamba_l{size}") for size in (1, 2))
    assert [hasattr(block, "tail") for block in small.blocks] == [True] + [False] * 23
    assert not any(hasattr(block, "tail") for block in large.blocks)


def test_the_stem_pads_until_patches_fit():
    stem = timm.create_model("plainmamba_l1").eval().stem
    for height, width in ((224, 224), (225, 193), (17, 1)):
        shape = stem(torch.randn(1, 3, height, width)).shape
        assert shape == (1, *stem.grid_size(height, width), 192)
        assert shape[1:3] == (-(-height // 16), -(-width // 16))


@pytest.mark.parametrize("permute", ["all", "input"])
@pytest.mark.parametrize("order", ["plainmamba", "window_2", "skip_2_0_0"])
def test_plain_scan_equals_formula(order, permute):
    """One set of parameters in every direction, a vector of the move added to B; padded steps read zeros."""
    torch.manual_seed(0)
    height, width, dim, states = 3, 5, 4, 3
    names = visionmix.scans.direction_names(order)
    scan = visionmix.layers.SelectiveScan2d(
        dim, names, dt_rank=2, d_state=states, shared=True, permute=permute, moves=True, bias_scale=2.0
    ).double()
    x = torch.randn(2, height, width, dim, dtype=torch.float64)
    cells = F.pad(x.flatten(1, 2), (0, 0, 0, 1))  # the last is a padded step's
    expected = torch.zeros_like(x).flatten(1, 2)
    for name in names:
        index, inverse = visionmix.scans.order(name, height, width)
        codes = visionmix.scans.move_codes(index, width)
        state, out = torch.zeros(2, dim, states, dtype=torch.float64), []
        for step, cell in enumerate(index.tolist()):
            place = cell if permute == "all" else step if step < height * width else -1
            low, B, C = (cells[:, place] @ scan.x_proj.weight.T).split([2, states, states], dim=-1)
            delta = F.softplus(low @ scan.delta_weight[0].T + 2 * scan.delta_bias[0])
            B = B + scan.move_B[codes[step]] if place >= 0 else B
            state = torch.exp(-delta[..., None] * scan.A_log[0].exp()) * state
            state = state + (delta * cells[:, cell])[..., None] * B[:, None]
            out.append((state * C[:, None]).sum(-1) + scan.D[0] * cells[:, cell])
        out = F.pad(torch.stack(out, dim=1), (0, 0, 0, 1))
        expected += out[:, inverse]
    for choice in ("auto", "reference"):
        with visionmix.kernels.use(choice):
            assert torch.allclose(scan(x).flatten(1, 2), expected, atol=1e-12)
    assert torch.allclose(scan.float()(x.float()).flatten(1, 2).double(), expected, atol=1e-5)


def test_plain_scan_refuses_options_that_do_not_fit():
    for option, value in (("d_conv", 4), ("permute", "x"), ("order", "rastr"), ("d_state", 0)):
        with pytest.raises(ValueError, match=rf"{option}=|{value!r}"):
            visionmix.create_mixer("plain_scan", 8, **{option: value})


def test_a_block_with_a_tail_takes_whole_maps():
    with pytest.raises(ValueError, match="block 0, a _LocalBlock, reads whole maps"):
        timm.create_model("test_plainmamba", mixer="softmax", num_heads=2, prefix_tokens="first", global_pool="token")


def test_files_with_the_stems_former_names_load():
    model, other = timm.create_model("test_plainmamba"), timm.create_model("test_plainmamba")
    former = {"stem.conv2.": "stem.convs.0.conv.", "stem.norm2.": "stem.convs.0.bn.", "stem.conv3.": "stem.proj."}
    tensors = {}
    for key, value in model.state_dict().items():
        for name, old in former.items():
            key = key.replace(name, old)
        tensors[key] = value
    assert not {key for key in tensors if key.startswith(tuple(former))}
    assert load_checkpoint(other, tensors) == []
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))

"""STViT-R's semantic tokens on maps of any size, against their definition, window by window."""

import pytest
import timm
import torch
from torch.nn import functional as F

from visionmix.layers import mlp
from visionmix.models import stvit


def seed_block(window_size):
    torch.manual_seed(0)
    options = {"num_heads": 2, "mixer": None, "mlp_layer": mlp, "norm_layer": torch.nn.LayerNorm}
    block = stvit._Seed(8, window_size=window_size, **options, device=None, dtype=torch.float64)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return block.eval()


def defined(block, x, window):
    """The semantic tokens of one image (height, width, 8)."""
    height, width, _ = x.shape
    rows, columns = -(-height // window), -(-width // window)
    out = x.new_zeros(3 * rows, 3 * columns, 8)
    whole = F.pad(x, [0, 0, 0, columns * window - width, 0, rows * window - height])
    normed = F.pad(block.norm1(x), [0, 0, 0, columns * window - width, 0, rows * window - height])
    for i in range(rows):
        for j in range(columns):
            own = whole[i * window : (i + 1) * window, j * window : (j + 1) * window]
            seeds = F.adaptive_max_pool2d(own.permute(2, 0, 1), 3).flatten(1).t()
            top = max(0, min(i * window - 1, (rows - 1) * window - 3))
            left = max(0, min(j * window - 1, (columns - 1) * window - 3))
            around = normed[top : top + window + 3, left : left + window + 3].flatten(0, 1)
            missing = (window + 3) ** 2 - around.shape[0]  # beyond a map of one window keys and values are zeros
            y = block.norm1(seeds)
            q, (k, v) = block.mixer.q(y), block.mixer.kv(torch.cat([y, around])).chunk(2, -1)
            k, v = (F.pad(each, [0, 0, 0, missing]) for each in (k, v))
            heads = [
                (a @ b.t() / 2).softmax(-1) @ c
                for a, b, c in zip(*(each.chunk(2, -1) for each in (q, k, v)), strict=True)
            ]
            s = block.scale1.gamma * block.mixer.proj(torch.cat(heads, -1))
            s = s + block.scale2.gamma * block.mlp(block.norm2(s))
            out[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = s.view(3, 3, 8)
    return out


@pytest.mark.parametrize("window", [3, 4, 7])
@pytest.mark.parametrize("size", [(14, 14), (9, 16), (5, 2), (1, 1), (22, 8)])
def test_seeds(size, window):
    block, x = seed_block(window), torch.randn(2, *size, 8, dtype=torch.float64)
    with torch.no_grad():
        same, semantic = block(x, x[:, :0, :0])
        expected = torch.stack([defined(block, image, window) for image in x])
    assert same is x
    assert torch.allclose(semantic, expected, atol=1e-10)


def test_the_third_stage_has_whole_groups():
    with pytest.raises(ValueError, match="the third stage has 5 blocks; give a multiple of 6 in depths"):
        timm.create_model("test_stvit_r_swin", depths=(1, 1, 5, 1))


def test_every_block_of_a_group_reaches_the_logits():
    model = timm.create_model("test_stvit_r_swin")
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    model(torch.randn(2, 3, 96, 96)).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in model.parameters())

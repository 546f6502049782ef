"""Window attention against its definition, and against timm's Swin where that is defined."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from visionmix import create_mixer


def window(**options):
    torch.manual_seed(0)
    mixer = create_mixer("window", 12, num_heads=3, **options)
    for value in mixer.parameters():
        nn.init.normal_(value, std=0.3)
    return mixer


def defined(mixer, x):
    """The definition: every cell looks for those in its window, on a padded map whose rows and columns are shifted."""
    _, height, width, dim = x.shape
    side, shift, heads = mixer.side, mixer.shift_size, mixer.num_heads
    rows, columns = -(-height // side) * side, -(-width // side) * side
    padded = torch.zeros(1, rows, columns, dim)
    padded[:, :height, :width] = x
    q, k, v = mixer.qkv(padded).unflatten(-1, (3, heads, -1)).unbind(3)
    table = mixer.bias_table.unflatten(0, (2 * side - 1, 2 * side - 1))

    def windows(length):
        """The cells along one axis of each window: the last one's wrap around, and its two ends are apart."""
        starts = range(shift, length - side + 1, side) if shift else range(0, length, side)
        whole = [list(range(start, start + side)) for start in starts]
        return [*whole, list(range(length - side + shift, length)), list(range(shift))] if shift else whole

    out = torch.zeros(1, rows, columns, heads, dim // heads)
    for at_rows in windows(rows):
        for at_columns in windows(columns):
            cells = [(row, column) for row in at_rows for column in at_columns]
            for row, column in cells:
                scores = torch.stack([
                    (q[0, row, column] * k[0, r, c]).sum(-1) * (dim // heads) ** -0.5
                    + table[(row - shift) % rows % side - (r - shift) % rows % side + side - 1,
                            (column - shift) % columns % side - (c - shift) % columns % side + side - 1]
                    for r, c in cells
                ])  # fmt: skip
                values = torch.stack([v[0, r, c] for r, c in cells])
                out[0, row, column] = (scores.softmax(0).unsqueeze(-1) * values).sum(0)
    return mixer.proj(out.flatten(3))[:, :height, :width]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("grid", [(6, 9), (5, 7), (1, 1), (3, 4)])
def test_window_equals_definition(grid, shift):
    mixer = window(window_size=3, shift=shift)
    x = torch.randn(1, *grid, 12)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x), atol=1e-5)


@pytest.mark.parametrize("shift", [0, 3])
def test_window_equals_timm_on_whole_windows(shift):
    mixer = window(window_size=7, shift=shift > 0)
    block = SwinTransformerBlock(12, (14, 21), num_heads=3, window_size=7, shift_size=shift)
    block.attn.load_state_dict({
        key.replace("bias_table", "relative_position_bias_table"): value for key, value in mixer.state_dict().items()
    }, strict=False)  # fmt: skip
    x = torch.randn(2, 14, 21, 12)
    assert torch.allclose(mixer(x), block._attn(x), atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_without_biases_is_one_whose_biases_are_0(shift):
    plain, biased = (window(window_size=3, shift=shift, relative_bias=each) for each in (False, True))
    assert biased.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["bias_table"]
    nn.init.zeros_(biased.bias_table)
    x = torch.randn(2, 6, 7, 12)
    assert torch.allclose(plain(x), biased(x), atol=1e-6)
    plain.set_grid_size((2, 5))
    assert (plain.side, plain.shift_size) == (2, 0)
    assert plain(x).shape == x.shape


def test_a_window_is_no_larger_than_the_map():
    assert (window(shift=True).side, window(shift=True).shift_size) == (7, 3)
    for grid, expected in {(7, 7): (7, 0), (9, 8): (7, 3), (5, 9): (5, 0), (1, 1): (1, 0)}.items():
        mixer = window(shift=True, grid_size=grid)
        assert (mixer.side, mixer.shift_size) == expected
        assert mixer.bias_table.shape == ((2 * expected[0] - 1) ** 2, 3)


def test_a_window_that_follows_the_map():
    mixer = window(window_size=lambda grid_size: min(grid_size) // 2, shift=True, grid_size=(8, 9))
    assert (mixer.side, mixer.shift_size) == (4, 2)
    mixer.set_grid_size((12, 12))
    assert (mixer.side, mixer.shift_size) == (6, 3)
    assert mixer.bias_table.shape == (121, 3)
    assert mixer.bias_table.requires_grad
    assert mixer(torch.randn(1, 12, 12, 12)).shape == (1, 12, 12, 12)


def test_tables_of_files_are_resampled_to_the_window():
    mixer = window(window_size=9)
    flat = torch.ones(169, 3) * torch.tensor([1.0, 2.0, 3.0])
    fitted = mixer.fit_tensor("bias_table", flat)
    assert torch.allclose(fitted, torch.tensor([1.0, 2.0, 3.0]).expand(289, 3))
    assert mixer.fit_tensor("bias_table", torch.ones(169, 4)).shape == (169, 4)


def test_window_names_mistakes():
    with pytest.raises(ValueError, match="window_size=0 is too small"):
        create_mixer("window", 12, window_size=0)
    with pytest.raises(ValueError, match="grid_size, which is None"):
        create_mixer("window", 12, window_size=min)

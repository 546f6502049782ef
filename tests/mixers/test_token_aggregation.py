"""Content-aware token aggregation against its definition, cell by cell, and its centres in training."""

from functools import partial

import pytest
import torch
from drawn import drawn_mixer
from torch.nn import functional as F

from visionmix import create_mixer

aggregation = partial(drawn_mixer, "token_aggregation", num_heads=3, qk_dim=6, num_centers=4, group_size=5)


def attended(q, keys, values):
    """The definition: one query of a head against a list of keys."""
    scores = torch.stack([q @ key * len(q) ** -0.5 for key in keys]).exp()
    return sum(score * value for score, value in zip(scores, values, strict=True)) / scores.sum()


def defined(mixer, x, centers):
    size, shape, out = mixer.group_size, x.shape, []
    for cells in x.flatten(1, 2):
        count = len(cells)
        nearest = [
            max(range(len(centers)), key=lambda c, x=x: F.cosine_similarity(x, centers[c], dim=0)) for x in cells
        ]
        order = sorted(range(count), key=lambda cell: (nearest[cell], cell))
        beyond = order + order[::-1]
        q, k, v = mixer.qkv(cells).split(mixer.parts, dim=-1)
        center_k, center_v = mixer.center_kv(centers).split(mixer.parts[1:], dim=-1)
        rows = [None] * count
        for place, cell in enumerate(order):
            start = place // size * size
            group = beyond[start : start + 2 * size]
            heads = []
            for head in range(mixer.num_heads):
                query, key, value, far_key, far_value = (
                    each.unflatten(-1, (mixer.num_heads, -1))[..., head, :] for each in (q, k, v, center_k, center_v)
                )
                near = attended(query[cell], key[group], value[group])
                heads.append(near + attended(query[cell], far_key, far_value))
            rows[cell] = torch.cat(heads)
        out.append(torch.stack(rows))
    return mixer.out(mixer.proj(torch.stack(out))).reshape(shape)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (2, 2), (3, 5), (4, 7)])
def test_aggregation_equals_definition(grid, fused):
    mixer = aggregation().double().eval()
    mixer.fused_attn = fused
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x, mixer.centers), atol=1e-12)


def moved(cells, centers):
    """The definition: each centre goes to the direction of the sum of its cells' directions."""
    directions = F.normalize(cells, dim=-1)
    nearest = (directions @ centers.T).argmax(dim=1)
    sums = [directions[nearest == index].sum(dim=0) for index in range(len(centers))]
    return torch.stack([s / s.norm() if s.any() else c for s, c in zip(sums, centers, strict=True)])


def test_training_moves_the_centers_of_all_images():
    mixer = aggregation(num_iters=3, momentum=0.75).double()
    x = torch.randn(2, 4, 4, 12, dtype=torch.float64)
    cells = x.flatten(0, 2)
    stretches = F.normalize(x.flatten(1, 2).mean(dim=0).unflatten(0, (4, 4)).mean(dim=1), dim=-1)
    first = stretches
    for _ in range(3):
        first = moved(cells, first)
    with torch.no_grad():
        assert torch.allclose(mixer(x), defined(mixer, x, first), atol=1e-12)
    assert torch.allclose(mixer.centers, first, atol=1e-12)
    second = F.normalize(first, dim=-1)
    for _ in range(3):
        second = moved(cells.roll(1, 0) + 1, second)
    mixer(x.flatten(0, 2).roll(1, 0).reshape(x.shape) + 1)
    assert torch.allclose(mixer.centers, 0.75 * first + 0.25 * second, atol=1e-12)


def test_only_the_last_move_has_gradients_and_evaluation_moves_nothing():
    mixer = aggregation(num_iters=3)
    x = torch.randn(1, 3, 4, 12, requires_grad=True)
    mixer.center_kv.weight.grad = None
    mixer(x).sum().backward()
    assert x.grad.isfinite().all()
    before = mixer.eval().centers.clone()
    mixer(x)
    assert torch.equal(before, mixer.centers)


def test_cells_of_one_centre_stay_in_order():
    """Unstable sorts differ from it on maps of some size; both are ways to sort by centre."""
    mixer = aggregation(group_size=64).eval()
    x = torch.randn(1, 24, 24, 12)
    stable = mixer(x)
    mixer.stable = False
    assert stable.isfinite().all()
    assert mixer(x).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12"),
        ({"qk_dim": 7}, "num_heads=3 does not divide qk_dim=7"),
        ({"num_centers": 0}, "num_centers=0 is too small"),
        ({"group_size": 0}, "group_size=0 is too small"),
        ({"num_iters": 0}, "num_iters=0 is too small"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("token_aggregation", 12, **options)

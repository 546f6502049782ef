"""OccMamba's scan of voxels: its order against the published one, its results against Mamba over that sequence."""

import golden
import pytest
import torch

import visionmix
from visionmix.layers.order import turns_order

KEYS = {
    "order": ("u_order", 16, 16, 4),
    "order_yx": ("u_order_transposed", 16, 16, 4),
    "order_12x10x3": ("u_order", 12, 10, 3),
}


@pytest.mark.parametrize("key", KEYS)
def test_voxels_are_read_in_the_published_order(key):
    _, arrays = golden.load("occmamba_order_16x16x4")
    name, height, width, levels = KEYS[key]
    index, inverse = turns_order(name, levels, height, width, False, torch.zeros(1))
    assert index.tolist() == arrays[key].tolist()
    assert index[inverse].tolist() == list(range(height * width * levels))


def test_voxels_are_mamba_over_the_published_sequence():
    _, arrays = golden.load("occmamba_order_16x16x4")
    order = torch.from_numpy(arrays["order_12x10x3"])
    mixer = visionmix.create_mixer("occupancy_scan", 8).double().eval()
    voxels = torch.randn(2, 12, 10, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        x, z = mixer.in_proj(voxels.flatten(1, 3)[:, order]).chunk(2, dim=-1)
        expected = mixer.proj(mixer.scan(x) * mixer.act(z))
        assert torch.allclose(mixer(voxels).flatten(1, 3)[:, order], expected, atol=1e-12)
        assert torch.equal(mixer(voxels[:, :, :, :1]).squeeze(3), mixer(voxels[:, :, :, 0]))

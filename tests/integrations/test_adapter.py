"""ViT-Adapter beside a plain model."""

import pytest
import torch

REASON = "OpenMMLab is not installed; run: sh tools/install_openmmlab.sh"
pytest.importorskip("mmengine", reason=REASON)
pytest.importorskip("mmcv.ops", reason=REASON)

from visionmix.integrations import adapter  # noqa: E402
from visionmix.integrations.adapter import Adapter  # noqa: E402
from visionmix.integrations.openmmlab import Backbone  # noqa: E402

MODEL = {"name": "test_vig", "depth": 5}
BN = {"norm_cfg": {"type": "BN"}, "width": 8, "num_heads": 3}


def test_a_cells_middle_is_where_its_map_is_sampled():
    points = adapter._points([(1, 2), (2, 1)], torch.device("cpu"))
    assert points[0, :, 0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


def test_maps_have_four_strides_and_some_of_them_are_those_of_all():
    torch.manual_seed(0)
    whole, some = Adapter(**MODEL, **BN).eval(), Adapter(**MODEL, **BN, out_indices=(1, 3)).eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = whole.state_dict()
    for name in list(state):
        if name.startswith(("up.", "prior.projections.0.", "norms.0.", "norms.2.")):
            del state[name]
    renamed = {}
    for name, value in state.items():
        for old, new in [(f"prior.projections.{i}.", f"prior.projections.{i - 1}.") for i in (1, 2, 3)] + [
            ("norms.1.", "norms.0."),
            ("norms.3.", "norms.1."),
        ]:
            if name.startswith(old):
                name = name.replace(old, new)
                break
        renamed[name] = value
    some.load_state_dict(renamed)
    assert (whole.strides, whole.channels) == ([4, 8, 16, 32], [48] * 4)
    assert (some.strides, some.channels) == ([8, 32], [48] * 2)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, fewer = whole(x), some(x)
    assert [tuple(each.shape) for each in maps] == [(2, 48, 64 // stride, 96 // stride) for stride in whole.strides]
    assert torch.equal(fewer[0], maps[1])
    assert torch.equal(fewer[1], maps[3])


def test_at_the_start_the_model_computes_as_without_an_adapter():
    torch.manual_seed(0)
    made = Adapter(**MODEL, **BN).eval()
    plain = Backbone(**MODEL, out_indices=(4,)).eval()
    plain.load_state_dict({key: value for key, value in made.state_dict().items() if key.startswith("features.")})
    for extractor in made.extractors:
        extractor.forward = lambda c, grids, x, grid: torch.zeros_like(c)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, (expected,) = made(x)[2], plain(x)
        torch.testing.assert_close(found * (1 + 1e-5) ** 0.5, expected)
        torch.nn.init.ones_(made.gammas[0])
        assert (made(x)[2] - found).abs().max() > 1e-3  # the cells have seen the adapter's


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "test_vmamba"}, "name='test_vmamba' is no plain model of stride 16"),
        ({"name": "test_vim_tiny"}, "is no plain model of stride 16, without prefix tokens"),
        ({"name": "test_plainmamba"}, "and of 4 blocks or more"),
        ({**MODEL, "out_indices": (3, 4)}, r"out_indices=\(3, 4\) must be among 0, 1, 2 and 3"),
        ({**MODEL, "mixer": "softmax", "mlp_layer": "mlp", "reduction": "tome:r=1"}, "does not go with the adapter"),
        ({"name": "test_dynamicvit"}, "name=.test_dynamicvit., reduced, does not go with the adapter"),
    ],
)
def test_other_models_and_maps_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Adapter(**options, **BN)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"images of 64x80 pixels do not divide into cells of 32; pad them"):
        Adapter(**MODEL, **BN)(torch.zeros(1, 3, 64, 80))

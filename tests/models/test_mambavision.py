"""MambaVision's windows."""

import pytest
import timm
import torch

import visionmix  # noqa: F401


def windows(model):
    return [stage.window_size for stage in model.stages[2:]]


def test_windows_have_the_size_of_the_option_of_the_tag_or_of_the_variant():
    with torch.device("meta"):
        assert windows(timm.create_model("mambavision_large2")) == [14, 7]
        assert windows(timm.create_model("mambavision_large2.in21k_in1k_512")) == [32, 16]
        assert windows(timm.create_model("mambavision_large3")) == [16, 8]
        assert windows(timm.create_model("mambavision_large3.in21k_in1k_512", window_sizes=(64, 32))) == [64, 32]


def test_weights_fit_windows_of_any_size_and_cells_see_those_of_their_window():
    torch.manual_seed(0)
    narrow = timm.create_model("test_mambavision", window_sizes=(2, 1)).eval()
    wide = timm.create_model("test_mambavision", window_sizes=(6, 3)).eval()
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(1, 3, 96, 96)
    changed = x.clone()
    changed[..., :8, :8] += 1  # the first cells of maps of 6x6 and 3x3
    for model, seen in ((narrow, False), (wide, True)):
        with torch.no_grad():
            differences = (model.forward_features(x) - model.forward_features(changed)).abs().amax(-1)[0]
        assert differences[0, 0] > 0
        assert (differences[-1, -1] > 1e-6 * differences[0, 0]).item() == seen  # sums may be rounded otherwise


@pytest.mark.parametrize("sizes", [(4,), (4, 2, 1), (0, 2)])
def test_other_windows_are_refused(sizes):
    with pytest.raises(ValueError, match=r"window_sizes=\(.*\) must be two positive numbers, of the last two stages"):
        timm.create_model("test_mambavision", window_sizes=sizes)

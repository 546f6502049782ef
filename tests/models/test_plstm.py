"""pLSTM-Vis: its sizes, whose parameters are no published figures but counted from the published code."""

import pytest
import timm
import torch


@pytest.mark.parametrize(("size", "params"), [("tiny", 6314404), ("small", 23272288), ("base", 89121496)])
def test_parameters_are_the_published_codes(size, params):
    with torch.device("meta"):
        model = timm.create_model(f"plstm_vis_{size}")
    assert sum(value.numel() for value in model.parameters()) == params

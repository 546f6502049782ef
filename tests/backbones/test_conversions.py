"""What tools of PyTorch make of a model by replacing its layers computes the same."""

import pytest
import timm
import torch
from tiny_models import EACH_MIXER
from torch import nn
from torch.ao.quantization import quantize_dynamic


def trained_a_little(name, **options):
    """Return a model in eval mode whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


@EACH_MIXER
def test_sync_batch_norm_computes_the_same_and_no_norm_hides_an_activation(name):
    model, images = trained_a_little(name), torch.randn(2, 3, 32, 64)
    norms = [(key, each) for key, each in model.named_modules() if getattr(each, "running_mean", None) is not None]
    assert [key for key, each in norms if [*each.children()]] == []
    if not norms:
        pytest.skip("it has no batch norm")
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(model)(images), expected)


# pLSTM divides each head's results by their size, and with it the rounding of q, k and v.
INT8 = {"test_plstm_vis": 0.06}
# Rounding ranks tokens of nearly equal scores anew, and untrained predictors find all nearly equal.
WHOLE = {"test_dynamicvit": {"keep_rate": 1.0}}


@EACH_MIXER
def test_dynamic_int8_is_close(name):
    model = trained_a_little(name, **WHOLE.get(name, {}))
    images = torch.randn(2, 3, 32, 64)  # maps smaller than a window, too
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [key for key, module in quantized.named_modules() if type(module) is nn.Linear]
    with torch.no_grad():
        expected = model(images)
        error = (quantized(images) - expected).norm() / expected.norm()
    assert error < INT8.get(name, 0.05)

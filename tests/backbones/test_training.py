"""Training steps in half precision, and images that are large."""

import pytest
import timm
import torch
from accelerator import DEVICES
from tiny_models import EVERY
from torch.nn import functional as F

pytestmark = [pytest.mark.long, EVERY]
STEPS = 50


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_steps_in_half_precision_stay_finite(name, dtype, device):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    images, targets = torch.randn(8, 3, 96, 96).to(device), (torch.arange(8) % 4).to(device)
    losses = []
    for step in range(STEPS):
        batch = slice(2 * (step % 4), 2 * (step % 4) + 2)
        with torch.autocast(device, dtype):
            loss = F.cross_entropy(model(images[batch]).float(), targets[batch])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("device", DEVICES)
def test_large_images(name, device):
    model = timm.create_model(name).eval().to(device)
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 1024, 1024, device=device)).isfinite().all()

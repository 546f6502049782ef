"""How far a result may lie from its float64 reference, relative to the largest value, by the table of the tools."""

import torch

from visionmix.tools.kernel_checks import TOLERANCE


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", *, factor: float = 1.0) -> None:
    """Compare by max|actual - expected| / max|expected|; the tolerance is that of `actual`'s dtype times `factor`.

    Where nothing but zeros is expected, the difference itself is compared.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{name} is not finite"
    if expected.numel() == 0:
        return
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    largest = expected.detach().double().abs().max().item() or 1.0
    allowed = TOLERANCE[actual.dtype] * factor
    assert difference <= allowed * largest, f"{name}: relative error {difference / largest:.2e}, allowed {allowed:.0e}"


def gradients(out: torch.Tensor | tuple, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a sum of the outputs, weighted at random (the same at every call)."""
    generator = torch.Generator().manual_seed(1)
    outs = [out] if isinstance(out, torch.Tensor) else [x for x in out if x is not None]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in outs]
    return torch.autograd.grad(sum((x.double() * w).sum() for x, w in zip(outs, weights, strict=True)), inputs)


def assert_gradients_close(actual, expected, *, factor: float = 1.0) -> None:
    """`assert_close` for each of a list of gradients."""
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, f"gradient {number}", factor=factor)

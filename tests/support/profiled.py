"""Which of the library's ops a computation calls."""

from collections.abc import Callable

import torch

from visionmix.kernels import use


def by_reference_and_by_op(run: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what `run` returns under `use("reference")`, where it may call no fused op, and without, where it must."""

    def profiled():
        with torch.profiler.profile() as profile:
            results = run()
        # The reference reads the order of its scan from an op too, the first time.
        ops = {event.key for event in profile.key_averages()} - {"visionmix::scan_order"}
        return results, any(op.startswith("visionmix::") for op in ops)

    with use("reference"):
        results, called = profiled()
    assert not called
    expected, called = profiled()
    assert called
    return results, expected

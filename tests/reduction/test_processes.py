"""Reduced models trained in two processes, which wait for a gradient of every parameter."""

import pytest
import reduced_processes
import torch
from torch import multiprocessing


@pytest.mark.long
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, monkeypatch):
    multiprocessing.spawn(reduced_processes.work, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    monkeypatch.setattr("torch.nn.functional.gumbel_softmax", reduced_processes.gumbel_softmax)
    for name, parameters in first.items():
        assert all(torch.equal(*pair) for pair in zip(parameters, second[name], strict=True)), name
    assert len(first) > len(reduced_processes.METHODS)
    for method, options in reduced_processes.METHODS.items():
        before, alone = reduced_processes.trained(method, options)
        for start, ours, together in zip(before, alone, first[method], strict=True):
            torch.testing.assert_close(together, ours, atol=1e-8, rtol=1e-8)
            assert not torch.equal(ours, start), method

"""Testing a model: figures against counts by hand, and shares of several processes."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F

from visionmix.tools import data
from visionmix.tools.evaluation import evaluate


def batches(logits, targets, sizes):
    """Return a loader whose images are `logits`: a model that passes them on gives these."""
    pairs = zip(logits.split(sizes), targets.split(sizes), strict=True)
    return [data.Batch(images, target, [], 0) for images, target in pairs]


@pytest.mark.parametrize("classes", [2, 4, 5, 7, 40])
def test_evaluate_equals_counts_by_hand(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(101, classes, generator=generator)
    targets = torch.randint(classes, (101,), generator=generator)
    loader = batches(logits, targets, [40, 0, 60, 1])
    result = evaluate(torch.nn.Identity(), loader, classes=classes, device=torch.device("cpu"))
    order = logits.argsort(dim=1, descending=True)
    hits = order == targets[:, None]
    assert result.count == 101
    assert result.top1 == pytest.approx(100 * sum(row[0] for row in hits.tolist()) / 101, abs=1e-5)
    assert result.top5 == pytest.approx(100 * sum(any(row[:5]) for row in hits.tolist()) / 101, abs=1e-5)
    assert result.loss == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for true, guess in zip(targets.tolist(), order[:, 0].tolist(), strict=True):
        confusion[true, guess] += 1
    assert torch.equal(result.confusion, confusion)


def test_a_loss_that_is_not_a_number_shows():
    logits = torch.randn(6, 3)
    logits[4] = float("nan")
    result = evaluate(
        torch.nn.Identity(), batches(logits, torch.zeros(6, dtype=torch.int64), [4, 2]), classes=3,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert result.loss != result.loss


PROCESS = """
    import sys
    import torch
    import torch.distributed as dist
    from visionmix.tools.data import Batch
    from visionmix.tools.evaluation import evaluate

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    logits, targets = torch.load(sys.argv[1])
    own = slice(0, 0) if rank == 2 else slice(rank, None, 2)
    logits, targets = logits[own], targets[own]
    loader = [Batch(logits, targets, [f"{rank}.png: broken", "same.png: broken"], 1)]
    result = evaluate(torch.nn.Identity(), loader, classes=7, device=torch.device("cpu"))
    torch.save((result.count, result.top1, result.top5, result.loss, result.confusion, result.unreadable),
               f"{sys.argv[1]}.{rank}")
    dist.destroy_process_group()
"""


@pytest.mark.long  # four processes that import PyTorch
def test_processes_with_unequal_shares_return_the_whole_result(tmp_path):
    logits, targets = torch.randn(23, 7), torch.randint(7, (23,))
    torch.save((logits, targets), tmp_path / "given")
    (tmp_path / "process.py").write_text(textwrap.dedent(PROCESS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, str(tmp_path / "process.py"), str(tmp_path / "given")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    whole = evaluate(torch.nn.Identity(), batches(logits, targets, [23]), classes=7, device=torch.device("cpu"))
    for rank in range(3):
        count, top1, top5, loss, confusion, unreadable = torch.load(tmp_path / f"given.{rank}")
        assert (count, top1, top5) == (23, whole.top1, whole.top5)
        assert loss == pytest.approx(whole.loss, rel=1e-6)
        assert torch.equal(confusion, whole.confusion)
        assert unreadable == ["0.png: broken", "1.png: broken", "2.png: broken", "same.png: broken"]

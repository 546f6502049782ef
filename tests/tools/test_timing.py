"""Measuring waits until other processes leave the machine alone."""

import itertools

import pytest

from visionmix.tools import timing

psutil = pytest.importorskip("psutil")


def pretend(monkeypatch, percents):
    """Let other processes take these percentages of two cores, one a look."""
    looks = iter(percents)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: next(looks))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    return looks


def test_a_busy_moment_is_waited_out(monkeypatch):
    looks = pretend(monkeypatch, [50.0, 6.0, 4.0, 50.0])
    timing.wait_until_quiet()
    assert next(looks) == 50.0  # the third look found 0.08 of a core


def test_a_machine_that_stays_busy_is_refused(monkeypatch):
    pretend(monkeypatch, itertools.repeat(50.0))
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    with pytest.raises(timing.NoisyMachine, match=r"for 30 s, 1\.00 cores"):
        timing.wait_until_quiet(patience=30.0)

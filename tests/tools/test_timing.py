"""Measuring waits until other processes leave the machine alone, and repeats until its rounds agree."""

import itertools
import time

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


def test_a_call_is_timed_in_quantiles(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.05)
    found = timing.measure(lambda: time.sleep(0.004))
    assert 0.004 <= found.p20 <= found.p50 <= found.p80


def pretend_rounds(monkeypatch, rounds):
    """Let the timer's rounds have these samples."""
    left = iter(rounds)

    class Round:
        def __init__(self, times):
            self.times = times

    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", lambda *_, **__: Round(next(left)))
    return left


def test_the_first_two_rounds_in_a_row_that_agree_count(monkeypatch):
    left = pretend_rounds(monkeypatch, [[1.0], [2.0], [1.05], [1.0, 1.1, 1.05, 1.2, 1.3], [9.0]])
    found = timing.measure(int)
    assert (found.p20, found.p50, found.p80) == pytest.approx((1.04, 1.1, 1.22))
    assert next(left) == [9.0]


def test_rounds_that_never_agree_are_refused(monkeypatch):
    pretend_rounds(monkeypatch, itertools.cycle([[1.0], [2.0]]))
    with pytest.raises(timing.NoisyMachine, match=r"8 rounds disagree: medians \['1e\+03 ms', '2e\+03 ms'"):
        timing.measure(int)


def test_quick_limits_take_the_fastest_of_the_calls_in_a_time(monkeypatch):
    clock = itertools.count()
    left = iter([9.0, 4.0, 2.0, 3.0, 5.0])  # the first call is not counted
    now = [0.0]

    def call():
        now[0] += next(left)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0] + next(clock) * 1e-9)
    assert timing.fastest(call, 8.5) == pytest.approx(2.0)
    assert next(left) == 5.0


def test_copies_of_each_size_have_a_rate(monkeypatch):
    monkeypatch.setattr(timing, "fastest", lambda call, seconds: call().numel() * seconds)
    assert timing.copy_rates((800, 8000), seconds=2.0) == {800: 4.0, 8000: 4.0}


def test_quick_limits_are_rates(monkeypatch):
    monkeypatch.setattr(timing, "fastest", lambda call, seconds: seconds)
    monkeypatch.setattr(timing, "_copy_and_product", lambda device, dtype: (None, 80, None, 600))
    assert timing.quick_limits(seconds=2.0) == (40, 300)

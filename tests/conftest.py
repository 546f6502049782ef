"""One thread a test process (tools/test.sh runs one process a core), NaN in fresh memory, no TF32, a time limit."""

import datetime
import gc
import time

import pytest

# Most of the collector's passes find nothing in modules and collected tests, which stay: a tenth of the time.
gc.set_threshold(50_000, 20, 20)

_BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--minutes N``: begin no test after N minutes; another one comes first each day."""
    parser.addoption("--minutes", type=float, help="begin no test after so many minutes; each day begins with others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("minutes") is not None and items:
        # A step that shares no factor with most counts goes through all places of the list.
        first = datetime.date.today().toordinal() * 61 % len(items)
        items[:] = items[first:] + items[:first]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - _BEGUN > 60 * minutes:
        pytest.skip("left for another day")


# PyTorch is imported where tests run: pytest-xdist's first process, which only deals them out, starts 6 s sooner.


@pytest.fixture(autouse=True)
def one_thread_and_no_tf32():
    """Set for each test anew: tools set threads, too, and two that wait for a busy core spend several times as much."""
    import torch

    torch.set_num_threads(1)
    # A GPU is held to float32; convolutions round to TF32 by default.
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(one_thread_and_no_tf32):
    from visionmix.tools.kernel_checks import poisoned_memory

    with poisoned_memory():
        yield

"""One thread a test process (tools/test.sh runs one process a core), NaN in fresh memory, no TF32, a time limit."""

import datetime
import gc
import time

import pytest
import torch

from visionmix.tools.kernel_checks import poisoned_memory

torch.set_num_threads(1)
# A GPU is held to float32; convolutions round to TF32 by default.
torch.backends.cudnn.allow_tf32 = False

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
    """Spare the modules and collected tests, which stay, and most of the collector's passes: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - _BEGUN > 60 * minutes:
        pytest.skip("left for another day")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    with poisoned_memory():
        yield

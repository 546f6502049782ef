"""Stopping a run between two steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType


class Interrupted(Exception):
    """Ctrl-C was pressed, or the process was asked to end."""


class Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop between two steps; the second one aborts at once."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say, self.requested = say, False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._on) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.say("stopping after this step; Ctrl-C again aborts at once")

    def check(self) -> None:
        """Raise Interrupted when a stop has been requested."""
        if self.requested:
            raise Interrupted

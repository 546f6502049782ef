"""Work in processes of their own: one that hangs or crashes costs what it was doing, and a new one goes on."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_WAKE = 1.0  # seconds between two looks at the clock
_WORDS = 300  # characters of an error


class Task(NamedTuple):
    """A call of the worker module's `run`: `part` and `item` are its arguments, `seconds` its limit."""

    part: str
    item: dict[str, Any]
    seconds: float


class Worker:
    """A process that runs `python -m module`, which hands its `run` to `serve`; started when it is first needed.

    Args:
        module: The worker's module.
        log: The file that its standard error is appended to.
        environment: Variables to set for it.
    """

    def __init__(self, module: str, log: Path, environment: Mapping[str, str] | None = None):
        self.module, self.log = module, log
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self.environment, start_new_session=True,
            )  # fmt: skip

    def stop(self) -> None:
        """End the process, and the compilers that it started."""
        process, self.process = self.process, None  # another thread may stop it too
        if process:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()

    def run(self, task: Task, keep: Callable[[dict], None]) -> str:
        """Run a task, with each of its rows to `keep`; return what stopped it, or nothing."""
        deadline = time.monotonic() + task.seconds
        self.process = process = self.process or self._start()
        try:
            process.stdin.write((json.dumps([task.part, task.item]) + "\n").encode())
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is read below
        for message in _messages(process, deadline):
            if "row" in message:
                keep(message["row"])
            else:
                if message["spoilt"]:
                    self.stop()
                return message["error"]
        status = process.poll()
        self.stop()
        if time.monotonic() >= deadline:
            return f"stopped after {task.seconds:.0f} s"
        return f"the process ended with status {status}; {self.log} has its last words"


def _messages(process: subprocess.Popen, deadline: float) -> Iterator[dict]:
    """Yield what a process writes, until it ends or the deadline has passed."""
    pipe, left = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (seconds := deadline - time.monotonic()) > 0:
            if not selector.select(min(seconds, _WAKE)):
                continue
            data = os.read(pipe, 1 << 16)
            if not data:
                process.wait()
                return
            *lines, left = (left + data).split(b"\n")
            yield from map(json.loads, lines)


def run_all(
    tasks: Iterable[Task], workers: list[Worker], deadline: float, keep: Callable[[Task, dict | None, str], None]
) -> list[Task]:
    """Run tasks in order, as many at a time as there are workers; return those that were not begun by the deadline.

    Args:
        tasks: What to do.
        workers: Who does it.
        deadline: On `time.monotonic`'s clock; a task that runs is stopped then.
        keep: Receives the task with each row that it gives, and once more, without, when it has ended, with what
            stopped it or "".
    """
    left, lock = deque(tasks), threading.Lock()

    def work(worker: Worker) -> None:
        while left and time.monotonic() < deadline:
            try:
                task = left.popleft()
            except IndexError:  # another worker took the last one
                return
            task = task._replace(seconds=min(task.seconds, deadline - time.monotonic()))

            def locked(row: dict | None, error: str = "", task: Task = task) -> None:
                with lock:
                    keep(task, row, error)

            locked(None, worker.run(task, locked))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(left)


def in_a_line(error: Exception) -> str:
    """Return an error's type and the beginning of its words."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_WORDS]


def serve(run: Callable[[str, dict], Iterable[dict]], spoilt: Callable[[], bool]) -> None:
    """Read tasks from standard input and write the rows that `run` yields, until the input ends.

    Args:
        run: Yields the rows of a part's item; an error ends that task alone.
        spoilt: Says after an error whether the process can do no more.
    """
    # What libraries print goes to standard error.
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        part, item = json.loads(line)
        error, dead = "", False
        try:
            for row in run(part, item):
                rows.write(json.dumps({"row": row}) + "\n")
        except Exception as caught:
            import traceback

            traceback.print_exc()
            error = in_a_line(caught)
            dead = spoilt()
        rows.write(json.dumps({"error": error, "spoilt": dead}) + "\n")

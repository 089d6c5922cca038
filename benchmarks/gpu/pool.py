"""Tasks in processes of their own: a crash, a hang or a lost CUDA context costs one task only.

A worker (`python -m benchmarks.gpu.worker FD`) reads tasks from its standard input, one JSON object
a line, and writes events to the pipe FD: ``step`` (what it is about to do), ``row`` (a result),
``done``. The parent keeps no CUDA context. A worker that dies, or says nothing for longer than its
task allows, is replaced, and ``on_lost`` decides what becomes of the task.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ENDING_S = 10.0


@dataclass(frozen=True)
class Task:
    """``payload`` is what the worker gets; ``silence_s``: how long a step may take; ``group``: with
    whom it shares time."""

    name: str
    payload: Row
    silence_s: float = 60.0
    group: str = ""


# (task, the step it was in, reason) -> the task to try instead, or None
OnLost = Callable[[Task, str, str], Task | None]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    events: int
    task: Task | None = None
    step: str = ""
    began_s: float = 0.0
    heard_s: float = 0.0
    pending: bytes = b""
    fatal: str = ""
    finished: int = 0
    spoke: bool = False


@dataclass
class Pool:
    """``environment`` is added to the workers'; what they print goes to ``log``.

    ``shares``: seconds of a group of tasks. Those of a group that has used them up wait until no
    other task does.
    """

    workers: int
    log: Path
    on_row: Callable[[Row], None]
    on_lost: OnLost
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.gpu.worker")
    shares: Mapping[str, float] = field(default_factory=dict)
    used_s: dict[str, float] = field(default_factory=dict)

    def run(self, tasks: Iterable[Task], until: float) -> list[Task]:
        """Run tasks, in order as far as workers are free, until ``time.monotonic()`` is ``until``.

        Returns the tasks that there was no time for, the interrupted ones among them.
        """
        queue = deque(tasks)
        idle_count = min(self.workers, len(queue))
        running: list[_Worker] = []
        try:
            for _ in range(idle_count):
                running.append(self._start())
            while True:
                self._hand_out(queue, running)
                busy = [worker for worker in running if worker.task is not None]
                if not busy:
                    return list(queue)
                now = time.monotonic()
                if now >= until:
                    cut = [worker.task for worker in busy if worker.task is not None]
                    return [*cut, *queue]
                self._listen(busy, min(until - now, 0.5))
                for worker in busy:
                    self._look_after(worker, queue, running)
        finally:
            for worker in running:
                self._kill(worker)  # all at once: a CUDA context takes seconds to go
            for worker in running:
                self._end(worker)

    def _start(self) -> _Worker:
        reading, writing = os.pipe()
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*self.command, str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        os.close(writing)
        os.set_blocking(reading, False)
        return _Worker(process, reading)

    def _hand_out(self, queue: deque[Task], running: list[_Worker]) -> None:
        for place, worker in enumerate(running):
            if worker.task is None and queue:
                if worker.process.poll() is not None:
                    self._end(worker)
                    running[place] = worker = self._start()
                worker.task = self._next(queue)
                worker.step, worker.heard_s = "start", time.monotonic()
                worker.began_s = worker.heard_s
                worker.spoke = False
                assert worker.process.stdin is not None
                line = json.dumps(worker.task.payload) + "\n"
                # A worker that is gone is noticed by its closed pipe.
                with contextlib.suppress(BrokenPipeError):
                    worker.process.stdin.write(line.encode())
                    worker.process.stdin.flush()

    def _next(self, queue: deque[Task]) -> Task:
        """The first task whose group has time left, or the first of all."""
        for place, task in enumerate(queue):
            if self.used_s.get(task.group, 0.0) < self.shares.get(task.group, float("inf")):
                del queue[place]
                return task
        return queue.popleft()

    def _account(self, worker: _Worker, task: Task) -> None:
        taken_s = time.monotonic() - worker.began_s
        self.used_s[task.group] = self.used_s.get(task.group, 0.0) + taken_s

    def _listen(self, busy: list[_Worker], wait_s: float) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.events, selectors.EVENT_READ, worker)
            for key, _ in selector.select(wait_s):
                worker: _Worker = key.data
                try:
                    data = os.read(worker.events, 1 << 20)
                except BlockingIOError:
                    continue
                if not data:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        worker.process.wait(5.0)
                    self._kill(worker)
                    continue
                *lines, worker.pending = (worker.pending + data).split(b"\n")
                for line in lines:
                    self._take(worker, json.loads(line))

    def _take(self, worker: _Worker, event: Row) -> None:
        worker.heard_s = time.monotonic()
        worker.spoke = True
        match event["event"]:
            case "row":
                self.on_row(event["row"])
            case "step":
                worker.step = event["step"]
            case "fatal":
                worker.fatal = event["reason"]
            case "done":
                if worker.task is not None:
                    self._account(worker, worker.task)
                worker.task = None
                worker.finished += 1

    def _look_after(self, worker: _Worker, queue: deque[Task], running: list[_Worker]) -> None:
        """Replace a worker that died or fell silent in the middle of a task."""
        task = worker.task
        if task is None:
            return
        code = worker.process.poll()
        silent_s = time.monotonic() - worker.heard_s
        if code is None and silent_s <= task.silence_s:
            return
        reason = worker.fatal or _how(code)
        if code is None:
            reason = f"stopped: nothing came for {silent_s:.0f} s"
        self._account(worker, task)
        running.remove(worker)
        self._end(worker)
        if code is not None and worker.finished and not worker.spoke:
            # It was on its way out when it was handed the task, which is not to blame. (One that
            # never finished anything may be unable to start, and is not tried again.)
            again = task
        else:
            again = self.on_lost(task, worker.step, reason)
        if again is not None:
            queue.appendleft(again)
        if queue:
            running.append(self._start())

    def _kill(self, worker: _Worker) -> None:
        """The worker and what it started (compilers, sanitizers): they share its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)

    def _end(self, worker: _Worker) -> None:
        self._kill(worker)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one may hang in the driver
            worker.process.wait(ENDING_S)
        with contextlib.suppress(OSError):
            if worker.process.stdin is not None:
                worker.process.stdin.close()
        with contextlib.suppress(OSError):
            os.close(worker.events)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"

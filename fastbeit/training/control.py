"""Stopping cleanly: signals, agreement between ranks, exit codes and the stall watchdog.

SIGTERM, SIGINT or SIGUSR1 to *any* rank makes every rank finish the same step, save it and exit
with :data:`EXIT_INTERRUPTED`; a second signal exits at once. torchrun passes SIGTERM and SIGINT on
to its ranks and then returns 1 whatever their code was: ``exit.json`` in the run folder says why a
run ended. (SIGUSR1 kills torchrun itself: send it to the ranks.)
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastbeit.training.checkpoint import write_durably
from fastbeit.training.distributed import World

EXIT_OK = 0
EXIT_USAGE = 2
"""Wrong flags, configuration or data: nothing was trained."""
EXIT_NONFINITE = 3
"""Too many non-finite steps in a row."""
EXIT_BAD_DATA = 4
"""More bad samples than allowed."""
EXIT_STALLED = 5
"""No step was finished for too long."""
EXIT_STORAGE = 6
"""The last checkpoint could not be written."""
EXIT_INTERRUPTED = 75
"""Stopped by a signal after saving; the same command resumes (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopVote:
    """Lets all ranks stop after the same step although only one of them was asked to.

    Every step each rank throws in its wish, and reads the outcome of the step before: the exchange
    runs on the CPU while the step computes, so nobody waits for it.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._wish = 0
        self._open: tuple[torch.Tensor, dist.Work | None] | None = None

    def ask(self, code: int) -> None:
        """Ask all ranks to stop with exit ``code`` (the largest code asked for wins)."""
        self._wish = max(self._wish, code)

    def outcome(self) -> int:
        """Close the last round and open the next; the agreed exit code, or 0. A collective call."""
        agreed = self.close()
        if not agreed:
            vote = torch.tensor([self._wish], dtype=torch.int32)
            work = dist.all_reduce(
                vote, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True
            )
            self._open = (vote, work)
        return agreed

    def close(self) -> int:
        """Finish the open round without opening another."""
        if self._open is None:
            return 0
        vote, work = self._open
        self._open = None
        if work is not None:
            work.wait()
        return int(vote)


class SignalTrap:
    """Turns the first signal into a vote to stop, and the second into an immediate exit."""

    def __init__(self, vote: StopVote, world: World) -> None:
        self.received: str | None = None
        self._vote = vote
        self._rank = world.rank
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(EXIT_INTERRUPTED)
        self.received = signal.Signals(number).name
        # os.write: print may not be called again from inside itself, where a signal can arrive.
        note = (
            f"rank {self._rank}: {self.received}: saving after this step; again to exit at once\n"
        )
        os.write(sys.stderr.fileno(), note.encode())
        self._vote.ask(EXIT_INTERRUPTED)

    def release(self) -> None:
        """Put the handlers from before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Beat(NamedTuple):
    """Where a rank is: published by its watchdog every few seconds."""

    step: int
    phase: str
    time_s: float


class Watchdog:
    """Ends a run whose steps have stopped, naming the rank that holds up the others.

    Each rank writes where it is to ``heartbeats/rank-N.json``. When no step finished for
    ``limit_s``, a rank reads what the others wrote: the culprit is the one furthest behind, or the
    one whose heartbeat itself has stopped. Then it prints its own stacks and exits.
    """

    ORDER = ("loading", "computing", "waiting", "saving")

    def __init__(self, folder: Path, world: World, *, limit_s: float, every_s: float = 5.0) -> None:
        self._folder = folder
        self._world = world
        self._limit_s = limit_s
        self._every_s = min(every_s, limit_s / 4)
        self._step, self._phase = 0, "loading"
        self._moved_s = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Say what this rank does now: loading, computing, waiting or saving."""
        if step != self._step or phase == "loading":
            self._moved_s = time.time()
        self._step, self._phase = step, phase

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        mine = self._folder / f"rank-{self._world.rank}.json"
        while not self._stop.wait(self._every_s):
            now = time.time()
            mine.write_text(json.dumps(Beat(self._step, self._phase, now)), encoding="utf-8")
            if now - self._moved_s > self._limit_s:
                self._report(now)

    def _report(self, now: float) -> None:
        print(
            f"rank {self._world.rank}: no step finished for {now - self._moved_s:.0f} s (step "
            f"{self._step}, {self._phase}); {self.culprit(now)}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        write_exit(self._folder.parent, EXIT_STALLED, self._step, self.culprit(now))
        os._exit(EXIT_STALLED)

    def culprit(self, now: float) -> str:
        """Which rank holds up the others, in words."""
        beats: dict[int, Beat] = {}
        for rank in range(self._world.size):
            try:
                text = (self._folder / f"rank-{rank}.json").read_text(encoding="utf-8")
                beats[rank] = Beat(*json.loads(text))
            except (OSError, ValueError, TypeError):
                return f"rank {rank} has never reported"
        rank, beat = min(beats.items(), key=lambda item: item[1].time_s)
        if now - beat.time_s > 3 * self._every_s + 1.0:
            return f"rank {rank} itself has been silent for {now - beat.time_s:.0f} s"
        rank, beat = min(
            beats.items(), key=lambda item: (item[1].step, self.ORDER.index(item[1].phase))
        )
        return f"rank {rank} is furthest behind: step {beat.step}, {beat.phase}"


def write_exit(run_dir: Path, code: int, step: int, reason: str) -> None:
    """Record in ``exit.json`` why and where a run ended (torchrun hides the ranks' exit codes)."""
    record = {"code": code, "reason": reason, "step": step, "time_s": time.time()}
    write_durably(run_dir / "exit.json", json.dumps(record, indent=1))

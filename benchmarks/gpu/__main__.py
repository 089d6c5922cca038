"""Everything about a GPU in one command, in under ten minutes, the most important first.

    PYTHONPATH=kernels:. python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results]

From a checkout, without installing anything but torch and Triton. In order: where and what; every
check of correctness (with compute-sanitizer beside it where there is one); the timings that targets
are about, interleaved with every peer that imports; whole steps, tokenizer and loader, by the
suites; all other timings; the verdict on each target; launch choices tuned in what time is left.
Each row is on the disk when it is known, so a run that is cut short keeps what it found.

``--dry-run`` goes through all of it on a CPU, with interpreted kernels and tiny shapes: it tries
the code, and its times mean nothing. ``--only TEXT`` (repeatable) takes the cases and problems
whose name contains it, and the suites that are named so (test_step.py, ...). Exit code: 0; 1 when a
check of correctness failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
# What is measured is what lies beside this file, installed or not.
KERNELS = ROOT / "kernels"
if (KERNELS / "fastbeit_kernels").is_dir():
    sys.path.insert(0, str(KERNELS))

from benchmarks.gpu import plan, sanitizer, suites, tuning  # noqa: E402
from benchmarks.gpu.environment import of_host  # noqa: E402
from benchmarks.gpu.pool import Pool, Task  # noqa: E402
from benchmarks.gpu.summary import summary  # noqa: E402
from benchmarks.gpu.verdict import verdicts  # noqa: E402
from benchmarks.results import ResultFolder  # noqa: E402

Row = dict[str, Any]

# Of the whole time: what correctness and the suites may take at most; the rest is for timings and,
# last, tuning.
CORRECTNESS_SHARE = 0.4
SUITES_SHARE = 0.33
# The first process imports from a cold disk and starts the driver.
START_SILENCE_S = 150.0
# Kept back for the verdict, the summary and the end of processes.
LAST_S = 10.0


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="end before (default 9)")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="where the dated folder goes (default benchmarks/results; a dry run: "
        "a temporary folder)",
    )
    parser.add_argument("--dry-run", action="store_true", help="try everything on the CPU")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="cases and problems whose name contains TEXT",
    )
    parser.add_argument("--workers", type=int, default=None, help="processes for correctness")
    chosen = parser.parse_args(words)
    if not chosen.minutes > 0:
        parser.error(f"--minutes must be positive, got {chosen.minutes}")
    if chosen.workers is not None and chosen.workers < 1:
        parser.error(f"--workers must be at least 1, got {chosen.workers}")
    return chosen


class Run:
    """One run from its folder to its summary."""

    def __init__(self, options: argparse.Namespace, command: list[str]) -> None:
        self.began = time.monotonic()
        self.options = options
        self.dry: bool = options.dry_run
        self.until = self.began + 60 * options.minutes - LAST_S
        self.environment = of_host(command, self.dry)
        paths = [str(ROOT), str(KERNELS), os.environ.get("PYTHONPATH", "")]
        self.variables = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TRITON_INTERPRET": "1" if self.dry else "0",
        }
        out = options.out
        if out is None:
            out = Path(tempfile.mkdtemp()) if self.dry else ROOT / "benchmarks" / "results"
        smi = self.environment["nvidia_smi"] or {}
        label = "dry run" if self.dry else smi.get("name", "gpu")
        source = (self.environment["commit"] or self.environment["source_sha256"])[:10]
        self.folder = ResultFolder.create(out, f"{label} {source}")
        self.rows: list[Row] = []
        self.save()

    def save(self) -> None:
        self.folder.write_environment(self.environment)

    def add(self, row: Row) -> None:
        if row["kind"] in ("device", "ceilings"):
            more = {key: value for key, value in row.items() if key != "kind"}
            self.environment |= more if row["kind"] == "device" else {"ceilings": more}
            self.save()
            return
        row = {**row, "at_s": round(time.monotonic() - self.began, 2)}
        self.rows.append(row)
        self.folder.add(row)
        if row.get("status") not in (None, "pass", "ok"):
            told = [
                str(row[key])
                for key in (
                    "check",
                    "case",
                    "dtype",
                    "problem",
                    "contestant",
                    "tool",
                    "task",
                    "target",
                    "measured",
                )
                if key in row
            ]
            print(f"{row['status']}: {', '.join(told)}: {row.get('reason', '')[:160]}", flush=True)

    def work(
        self,
        tasks: list[Task],
        workers: int,
        until: float,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        if not tasks:
            return
        log = self.folder.path / "workers.log"
        lost = plan.on_lost(self.add)
        # Many at once: their threads are not to wait for each other's.
        few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"} if workers > 1 else {}
        variables = self.variables | few
        pool = Pool(workers, log, self.add, lost, variables, shares=shares or {})
        for task in pool.run(tasks, until):
            self.add({"kind": "not run", "task": task.name, "reason": "out of time"})

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def everything(self) -> None:
        only = self.options.only
        self.say(f"results go to {self.folder.path}")
        simple = [
            Task(kind, {"kind": kind, "dry": self.dry}, START_SILENCE_S)
            for kind in ("environment", "ceilings")
        ]
        self.work(simple, 1, self.until)
        checks = plan.correctness_tasks(self.dry, only)
        workers = self.options.workers or (1 if self.dry else min(8, os.cpu_count() or 1))
        self.say(f"correctness: {len(checks)} tasks in {workers} processes")
        share = self.began + CORRECTNESS_SHARE * 60 * self.options.minutes

        def check() -> None:
            self.work(checks, workers, min(share, self.until))

        if self.dry:
            check()
        else:
            limit_s = share - time.monotonic()
            for row in sanitizer.run_beside(self.folder.path, self.variables, check, limit_s):
                self.add(row)
        self.finish()
        timings = plan.timing_tasks(self.dry, only, self.ceiling())
        left_s = self.until - time.monotonic()
        self.say(
            f"timings: {len(timings)} groups, up to {plan.measuring_s(timings):.0f} s of measuring "
            f"besides preparing, in {left_s:.0f} s"
        )
        shares = plan.timing_shares(left_s)
        first = plan.most_important(timings)
        self.work(first, 1, self.until, shares)
        self.finish()
        limit_s = min(SUITES_SHARE * 60 * self.options.minutes, self.until - time.monotonic())
        self.say(f"suites: {limit_s:.0f} s at most")
        self.add(suites.run_suites(self.folder.path, limit_s, self.variables, only, self.dry))
        self.work(timings[len(first) :], 1, self.until, shares)
        self.finish()
        left_s = self.until - time.monotonic()
        self.add(tuning.tune(self.folder.path, left_s, self.variables, self.dry))

    def ceiling(self) -> Row | None:
        measured = self.environment.get("ceilings")
        if not measured:
            return None
        return {key: measured[key] for key in ("tflops", "tb_per_s", "source")}

    def finish(self) -> int:
        """Verdicts and summary of what there is; called after each stage, the last one counts."""
        self.rows = [row for row in self.rows if row["kind"] != "verdict"]
        smi = self.environment["nvidia_smi"] or {}
        gpu = self.environment.get("gpu") or (None if self.dry else smi.get("name"))
        for row in verdicts(self.rows, gpu):
            self.rows.append(row)
        self.folder.write("summary.md", summary(self.environment, self.rows))
        failed = any(
            row["status"] == "fail"
            for row in self.rows
            if row["kind"] in ("correctness", "sanitizer")
        )
        return 1 if failed else 0


def told(rows: list[Row]) -> str:
    """The verdicts in short, one a line; everything else is in the summary's file."""
    judged = [row for row in rows if row["kind"] == "verdict"]
    lines = [f"{row['status']}: {row['target']}: {row['measured']}" for row in judged]
    lines += [f"  {row['reason']}" for row in judged[:1] if row["reason"]]
    return "\n".join(["## Targets", *lines])


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            print(
                "benchmarks.gpu needs an NVIDIA GPU, and torch sees none "
                f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}). "
                "Check nvidia-smi and that torch is a CUDA build, or add --dry-run to go through "
                "everything on the CPU with tiny shapes.",
                file=sys.stderr,
            )
            return 2
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the suites are stopped by it
    words = sys.argv[1:] if words is None else words
    # Where the folder went is no part of what was measured.
    out = None if options.out is None else str(options.out)
    shown = ["OUT" if word == out else word for word in words]
    run = Run(options, ["python", "-m", "benchmarks.gpu", *shown])
    try:
        run.everything()
    finally:
        code = run.finish()
        for row in run.rows:
            if row["kind"] == "verdict":
                run.folder.add(row)
        run.folder.close()
        run.say(f"written: {run.folder.path / 'summary.md'}")
        print(told(run.rows))
    return code


if __name__ == "__main__":
    sys.exit(main())

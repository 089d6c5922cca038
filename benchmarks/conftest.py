"""`benchmarks` is not installed: the checkout has to be on the path, however pytest began.

``--record`` keeps what a run measures (see `benchmarks.recorder`). What holds for every benchmark
of a session is here: exact fp32, a deadline, a compiler that forgets what others compiled.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

BEGAN_S = time.monotonic()
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("benchmark").addoption(
        "--record",
        nargs="?",
        const=Path(ROOT, "benchmarks", "results"),
        type=Path,
        default=None,
        metavar="DIR",
        help="keep the results: a dated folder in DIR (benchmarks/results, for whole runs)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_disable", False):  # the code is tried, in tiny sizes
        os.environ.setdefault("FASTBEIT_BENCH_TINY", "1")
    # A library's warning (Inductor's, that TF32 would be faster) is no reason to lose a row.
    config.addinivalue_line("filterwarnings", "default")
    out = config.getoption("record", None)
    if out is not None:
        from benchmarks.recorder import Recorder, check_options

        check_options(config, out)
        config.pluginmanager.register(Recorder(config, out), "benchmarks.recorder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A row that doesn't fit says so, and costs no other."""
    import torch

    from benchmarks.suite import missing

    try:
        return (yield)
    except torch.OutOfMemoryError:
        pass  # left, so that what it refers to is let go of
    missing("the device's memory is too small")


@pytest.fixture(scope="session", autouse=True)
def deadline() -> None:
    from benchmarks.suite import begin_session

    begin_session(BEGAN_S)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As if a benchmark were the first one."""
    from benchmarks import suite

    suite.free_memory()
    with suite.begin_compiling():
        yield


@pytest.fixture(scope="session", autouse=True)
def exact_fp32() -> None:
    """Whoever is timed in fp32 gets it: by default cuDNN rounds convolutions' factors to TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False

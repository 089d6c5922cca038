"""What the tests of compiled kernels share: the report and the broken kernels, compiled once.

Compiling happens in processes of their own, because Triton can't compile where it interprets.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

# adapted.py, peer_models.py
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

REPORTS = (
    # (targets, dtypes): every launch in bf16 on all targets, in the other dtypes on one.
    ("sm_80,sm_90,sm_100", "bf16"),
    ("sm_90", "fp16,fp32"),
)
# What is compiled is what ``launches`` lists, so that no kernel can be forgotten. It takes minutes
# on two cores where Triton's cache is empty.
COMPILING_S = 1200


def pytest_collection_modifyitems(items):
    """Whichever test comes first waits for the report."""
    for item in items:
        if "compile_report" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(2 * COMPILING_S))
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def compile_environment(repo_root):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{repo_root}:{repo_root / 'kernels'}"}


@pytest.fixture(scope="session")
def compile_report(run_python, compile_environment, tmp_path_factory):
    """Rows of ``python -m fastbeit_kernels.inspect``."""
    rows, folder = [], tmp_path_factory.mktemp("inspect")
    for number, (archs, dtypes) in enumerate(REPORTS):
        file = folder / f"{number}.json"
        # Whether rules are kept is for the tests to say, one by one: any exit code.
        done = run_python(
            *("-m", "fastbeit_kernels.inspect", "--arch", archs, "--dtype", dtypes),
            *("--json", file),
            env=compile_environment,
            expect=None,
            timeout_s=COMPILING_S,
        )
        assert done.returncode in (0, 1) and file.exists(), done.stderr
        rows += json.loads(file.read_text())["rows"]
    return rows


@pytest.fixture(scope="session")
def broken_kernels(run_python, compile_environment):
    """``broken_kernels.py``: what the report says of kernels that break one rule each."""
    script = Path(__file__).with_name("broken_kernels.py")
    done = run_python(script, env=compile_environment, timeout_s=200)
    return json.loads(done.stdout)

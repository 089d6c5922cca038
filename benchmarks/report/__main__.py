"""`python -m benchmarks.report`: see the package's docstring."""

from __future__ import annotations

from benchmarks.report import main

if __name__ == "__main__":
    raise SystemExit(main())

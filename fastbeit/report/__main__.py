"""Render the report of a run folder again: ``python -m fastbeit.report RUN_DIR``."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from fastbeit.report import render_report


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where the folder is not a run's."""

    def report(run_dir: Annotated[str, tyro.conf.Positional]) -> int:
        """Write report.html from the files of a run folder.

        Args:
            run_dir: the run folder, with metrics.jsonl in it.
        """
        try:
            print(render_report(run_dir))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return tyro.cli(report, args=argv, prog="python -m fastbeit.report")


if __name__ == "__main__":
    sys.exit(main())

"""The process that touches the device: `python -m benchmarks.gpu.worker FD`. See `pool`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

Row = dict[str, Any]


class Events:
    """Lines to the parent. When the parent is gone, writing fails and the worker ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def _send(self, event: Row) -> None:
        line = (json.dumps(event) + "\n").encode()
        while line:
            line = line[os.write(self._descriptor, line) :]

    def row(self, row: Row) -> None:
        self._send({"event": "row", "row": row})

    def step(self, step: str) -> None:
        self._send({"event": "step", "step": step})

    def done(self) -> None:
        self._send({"event": "done"})

    def fatal(self, reason: str) -> None:
        self._send({"event": "fatal", "reason": reason})


def main() -> None:
    events = Events(int(sys.argv[1]))
    # Imported here: a worker that can't import says why.
    import torch

    from benchmarks.gpu import tasks

    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for every contestant

    for line in sys.stdin:
        payload = json.loads(line)
        try:
            tasks.run(payload, events)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            events.fatal(reason)
            sys.exit(3)
        events.done()


if __name__ == "__main__":
    main()

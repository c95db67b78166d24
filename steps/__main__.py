"""``python -m steps NAME --spec URI``: run one step in this process, from a JSON description at any fsspec URI.

The last line on standard output is a JSON object: the artifact's step and key, whether it was reused, and seconds; with
``--events`` every line is one object, progress included (``steps.protocol``). ``python -m steps --serve`` reads lines
``{"name": …, "spec": URI}`` from standard input and runs one step after another, so that torch, model and data are
loaded once for many steps; it ends when the process that started it has ended.

Exit status: 0 if the artifact exists, 2 for wrong input, 75 for a transient error (a retry makes sense), 1 for a
defect.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

# Set before torch is imported: its threads sleep while they wait (see flows/cli.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from steps import REGISTRY
from steps.protocol import Event, StepServer

WRONG_INPUT, TRANSIENT, DEFECT = 2, os.EX_TEMPFAIL, 1
PARENT_SECONDS = 1.0  # between two looks at whether the parent still runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step, or the steps that standard input names."""
    parser = argparse.ArgumentParser(prog="python -m steps", description="Run one step of a compression run.")
    parser.add_argument("name", nargs="?", choices=sorted(REGISTRY), help="the step")
    parser.add_argument("--spec", help="fsspec URI of the step's JSON description")
    parser.add_argument(
        "--events", action="store_true", help="print progress and the result as JSON, one object per line"
    )
    parser.add_argument("--serve", action="store_true", help="run the steps that standard input names, one per line")
    arguments = parser.parse_args(argv)
    if arguments.serve == bool(arguments.name and arguments.spec):
        parser.error("give NAME and --spec URI, or --serve")
    with _events_on_stdout() as out:
        if arguments.serve:
            return _serve(out)
        event = StepServer().run(
            arguments.spec, arguments.name, lambda event: _print(event, out) if arguments.events else None
        )
        if arguments.events:
            _print(event, out)
        elif event["event"] == "done":
            _print({key: event[key] for key in ("step", "key", "reused", "seconds")}, out)
    if event["event"] == "done":
        return 0
    if event["kind"] is None:
        print(event["message"], file=sys.stderr)
    else:
        print(f"mlorq: error: {' '.join(event['message'].split())}", file=sys.stderr)
    return TRANSIENT if event["can_pass"] else DEFECT if event["kind"] is None else WRONG_INPUT


def _serve(out: IO[str]) -> int:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server = StepServer()
    for line in sys.stdin:
        request = json.loads(line)
        _print(server.run(request["spec"], request["name"], lambda event: _print(event, out)), out)
    return 0


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even in the middle of a step: nobody waits for it.

    The same run can be started again meanwhile; it would wait for the step, on a device that this process holds.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with processes that user code may have started
    os._exit(TRANSIENT)


def _events_on_stdout() -> IO[str]:
    """Standard output for events alone: all other output to it, that of C code included, goes to standard error."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # visible while the step runs, and kept if it is killed
    return out


def _print(event: Event, out: IO[str]) -> None:
    print(json.dumps(event), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())

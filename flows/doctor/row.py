"""Findings of ``mlorq doctor``, and checks that cannot hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mlorq.errors import one_line

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: what was looked at: ``extra onnx``.
        state: ok; missing: it is not there; problem: it is there and does not work.
        detail: what was found.
        advice: what to do; empty if nothing.
        needed_by: what of the given configuration needs it; empty: nothing does.
    """

    name: str
    state: State
    detail: str
    advice: str = ""
    needed_by: str = ""

    @property
    def failed(self) -> bool:
        """Whether a configuration needs it in vain."""
        return bool(self.needed_by) and self.state != "ok"

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)


Look = Callable[[], list[Row]]


@dataclass(frozen=True)
class Check:
    """A look at one part of the surroundings.

    Attributes:
        name: of its row, if it gives no other.
        look: gives its rows.
        seconds: after which it is given up.
    """

    name: str
    look: Look
    seconds: float


def run_checks(checks: list[Check]) -> list[Row]:
    """The rows of all checks, which run at the same time.

    A check that fails or does not answer gives a row that says so.
    """
    running = [_Running(check) for check in checks]
    return [row for one in running for row in one.rows()]


class _Running:
    """A check in a thread that does not keep the process from ending."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.found: list[Row] = [
            Row(check.name, "problem", f"no answer within {check.seconds:.0f} s", "see whether it responds at all")
        ]
        self.deadline = time.monotonic() + check.seconds
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        try:
            self.found = self.check.look()
        except Exception as error:  # of any library
            self.found = [Row(self.check.name, "problem", f"{type(error).__name__}: {one_line(error)}")]

    def rows(self) -> list[Row]:
        self.thread.join(max(0.0, self.deadline - time.monotonic()))
        return self.found


def needed(rows: list[Row], needs: dict[str, str]) -> list[Row]:
    """Rows with what needs them.

    Args:
        rows: the rows.
        needs: what needs something, by the name of its row; ``packages`` stands for every required package.
    """
    names = ["packages" if row.name.startswith("package ") else row.name for row in rows]
    return [replace(row, needed_by=needs.get(name, row.needed_by)) for row, name in zip(rows, names, strict=True)]

"""The watch that tests of runners give to a step."""

from __future__ import annotations

from collections.abc import Callable


class Watch:
    """Keeps what a runner tells and calls back; ``stop`` makes the run be over."""

    def __init__(
        self,
        on_progress: Callable[[], object] = lambda: None,
        on_log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.done: list[tuple[int, int]] = []
        self.lines: list[str] = []
        self.stop: BaseException | None = None
        self._on_progress, self._on_log = on_progress, on_log

    def progress(self, done: int, total: int) -> None:
        self.done.append((done, total))
        self._on_progress()
        self.check()

    def check(self) -> None:
        if self.stop is not None:
            raise self.stop

    def log(self, line: str) -> None:
        self.lines.append(line)
        self._on_log(line)

"""What a run shows while it works."""

from __future__ import annotations

import io
import threading
import time

import pytest

from flows.progress import Observers, Phase, PlainProgress, PrefectProgress, RichProgress, format_seconds
from mlorq.artifacts.store import ArtifactRef
from steps.base import Outcome, StepSpec


def spec(index: int, step: str = "sensitivity") -> StepSpec:
    return StepSpec(step, 1, {"index": index}, {}, f"blocks.{index}.up")


def outcome(reused: bool = False, seconds: float = 2.0) -> Outcome:
    return Outcome(ArtifactRef("sensitivity", "0"), reused, seconds)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_follows_from_computed_steps_alone() -> None:
    clock = Clock()
    phase = Phase("sensitivity", 10, clock)
    for index in range(4):
        phase.end(spec(index), outcome(reused=True))
    assert phase.left is None
    clock.now = 5.0
    phase.begin(spec(4))
    clock.now = 7.0
    phase.end(spec(4), outcome())
    assert phase.done == 5
    assert phase.left == pytest.approx(5 * 2.0)
    phase.begin(spec(5))
    clock.now = 8.0
    phase.advance(spec(5), 1, 2)
    assert phase.share == pytest.approx(0.55)
    assert phase.left == pytest.approx(3.0 / 1.5 * 4.5)
    assert phase.elapsed == pytest.approx(8.0)


def test_a_failed_step_is_not_done() -> None:
    phase = Phase("round", 2)
    phase.begin(spec(0))
    phase.advance(spec(0), 9, 10)
    phase.end(spec(0), None)
    assert (phase.done, phase.share, phase.current) == (0, 0.0, "")


def test_plain_lines_do_not_flood() -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream)
    plain.phase("candidates", 100)
    for index in range(100):
        plain.step_finished(spec(index), outcome(reused=True))
    plain.phase("sensitivity", 3)
    plain.step_finished(spec(0), outcome(reused=True))
    for index in (1, 2):
        plain.step_started(spec(index))
        for done in range(1000):
            plain.step_progress(spec(index), done, 1000)
        plain.step_finished(spec(index), outcome())
    plain.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "candidates: 100 of 100 reused"
    assert lines[1].startswith("sensitivity 2/3  blocks.1.up  2.0s  (")
    assert lines[2] == "sensitivity 3/3  blocks.2.up  2.0s"
    assert lines[3] == "sensitivity: 1 of 3 reused"
    assert len(lines) == 4


def test_long_steps_are_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.progress.LINE_SECONDS", 0.0)
    stream = io.StringIO()
    plain = PlainProgress(stream)
    plain.phase("round", 4)
    plain.step_started(spec(0))
    plain.step_progress(spec(0), 1, 2)
    assert "round 0/4  blocks.0.up  50%" in stream.getvalue()


def test_live_lines_from_many_threads() -> None:
    stream = io.StringIO()
    live = RichProgress(stream)
    both = Observers([live, PlainProgress(io.StringIO())])
    both.phase("sensitivity", 40)

    def work(first: int) -> None:
        for index in range(first, first + 10):
            both.step_started(spec(index))
            both.step_progress(spec(index), 1, 3)
            both.step_finished(spec(index), outcome(reused=index % 2 == 0))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 40, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both.phase("round", 1)
    both.step_started(spec(99))
    both.step_failed(spec(99))
    both.close()
    assert "40/40" in stream.getvalue()
    assert "20 reused" in stream.getvalue()


class Server:
    """Stands in for Prefect's artifacts: keeps the last state of each, and who sent it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fail_first: bool = False) -> None:
        monkeypatch.setattr("flows.progress.UPDATE_SECONDS", 0.001)
        monkeypatch.setattr("prefect.artifacts.create_progress_artifact", self.create)
        monkeypatch.setattr("prefect.artifacts.update_progress_artifact", self.update)
        self.states: dict[str, tuple[float, str]] = {}
        self.senders: set[int] = set()
        self.updates = 0
        self.fail_first = fail_first

    def create(self, share: float, *, key: str, description: str) -> str:
        return self.update(key, share, description)

    def update(self, key: str, share: float, description: str) -> str:
        self.senders.add(threading.get_ident())
        self.updates += 1
        if self.fail_first and self.updates == 1:
            raise ConnectionError("the server is busy")
        time.sleep(0.002)  # so that a second sender would overtake the first
        self.states[key] = (share, description)
        return key


@pytest.mark.parametrize("fail_first", [False, True])
def test_progress_artifacts_end_complete(monkeypatch: pytest.MonkeyPatch, fail_first: bool) -> None:
    server = Server(monkeypatch, fail_first=fail_first)
    artifacts = PrefectProgress("net", ["3bit", "2.5bit"])
    artifacts.phase("layers", 1)
    artifacts.step_started(spec(0, "layers"))
    artifacts.step_finished(spec(0, "layers"), outcome())
    for name, budget in (("sensitivity", ""), ("round", "3bit"), ("round", "2.5bit")):
        artifacts.phase(name, 14, budget)
        for index in range(14):
            artifacts.step_started(spec(index, name))
            artifacts.step_progress(spec(index, name), 1, 2)
            artifacts.step_finished(spec(index, name), outcome(reused=index == 0))
    artifacts.phase("candidates", 1)
    artifacts.step_finished(spec(0, "candidates"), outcome(reused=True))
    artifacts.phase("summary", 1)
    artifacts.step_started(spec(0, "summary"))
    artifacts.step_finished(spec(0, "summary"), outcome())
    artifacts.close()
    # Short phases, and those that only reuse, have none.
    assert server.states == {
        "sensitivity": (100.0, "net 3bit 2.5bit: sensitivity 14/14, 1 reused"),
        "round-3bit": (100.0, "net 3bit: round 14/14, 1 reused"),
        "round-2-5bit": (100.0, "net 2.5bit: round 14/14, 1 reused"),
    }
    assert len(server.senders) == 1
    assert threading.get_ident() not in server.senders


def test_a_failed_phase_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch)
    artifacts = PrefectProgress("net", ["3bit"])
    artifacts.phase("sensitivity", 2)
    artifacts.step_started(spec(0))
    artifacts.step_failed(spec(0))
    artifacts.close()
    assert server.states == {"sensitivity": (0.0, "net 3bit: sensitivity 0/2, 1 failed")}


def test_progress_never_fails_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", lambda *_, **__: "id")
    monkeypatch.setattr("prefect.artifacts.update_progress_artifact", down)
    artifacts = PrefectProgress("net", ["3bit"])
    artifacts.phase("round", 1)
    artifacts.step_started(spec(0))
    artifacts.step_finished(spec(0), outcome())
    artifacts.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.9, "9.9s"), (9.96, "10s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text

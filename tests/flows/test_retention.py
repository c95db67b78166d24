"""Flow ``retention``: which runs it keeps, and what it removes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.garbage import collect
from flows.retention import created_runs, kept_runs, retention_flow, runs_with_tags
from mlorq.artifacts.store import ArtifactRef, Store, json_bytes
from mlorq.errors import ConfigError, StoreError

NOW = datetime(2030, 1, 10, tzinfo=UTC)
RUNS = {f"net-{days}": NOW - timedelta(days=days) for days in (1, 2, 3, 40)}


@pytest.mark.parametrize(
    ("keep_last", "days", "tagged", "kept"),
    [
        (1, None, (), ["net-1"]),
        (2, None, ("net-40", "of another store"), ["net-1", "net-2", "net-40"]),
        (1, 2.5, (), ["net-1", "net-2"]),
        (9, None, (), ["net-1", "net-2", "net-3", "net-40"]),
    ],
)
def test_which_runs_are_kept(keep_last: int, days: float | None, tagged: tuple[str, ...], kept: list[str]) -> None:
    since = None if days is None else NOW - timedelta(days=days)
    assert kept_runs(RUNS, keep_last, since, tagged) == kept


def write_run(store: Store, index: int) -> dict[str, ArtifactRef]:
    """A run with an artifact of its own, and one that all runs share."""
    made: dict[str, ArtifactRef] = {}
    for step, key in (("capture", "f" * 32), ("compressed", f"{index:032x}")):
        if not store.exists(ArtifactRef(step, key)):
            store.write(step, key, {"a.bin": b"0" * 10})
        made[step] = ArtifactRef(step, key)
    run: dict[str, Any] = {"run": f"net-{index}", "artifacts": {step: ref.to_json() for step, ref in made.items()}}
    made["summary"] = store.write("summary", f"{index:032x}", {"run.json": json_bytes(run)})
    made["compare"] = store.write("compare", f"{index:032x}", {"a": b"1"}, details={"runs": [f"net-{index}"]})
    return made


def test_old_runs_go_with_what_only_they_need(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    made = [write_run(store, index) for index in range(3)]
    runs = created_runs(store)
    assert set(runs) == {"net-0", "net-1", "net-2"}

    def keep() -> list[str]:
        return kept_runs(runs | {"net-0": NOW - timedelta(days=9999)}, 2, None)

    kept, counted = collect(store, keep, "retention", dry_run=True)
    assert (set(kept), counted["artifacts"]) == ({"net-1", "net-2"}, 3)
    assert all(store.exists(ref) for refs in made for ref in refs.values())
    assert collect(store, keep, "retention")[1] == counted
    gone = {step for step, ref in made[0].items() if not store.exists(ref)}
    assert gone == {"compressed", "summary", "compare"}
    assert all(store.exists(ref) for refs in made[1:] for ref in refs.values())


def test_nothing_is_removed_under_a_run(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    refs = write_run(store, 0) | {"other": write_run(store, 1)["summary"]}
    with store.leases.hold("runs", "a run of net"), pytest.raises(StoreError, match="a run of net"):
        collect(store, lambda: ["net-1"], "retention")
    assert all(store.exists(ref) for ref in refs.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_last": 0}, "keep_last: expected a number of runs"),
        ({"max_age_days": "30"}, "max_age_days: expected a number of days"),
        ({"max_age_days": True}, "max_age_days: expected a number of days"),
        ({"keep_tags": "best"}, "keep_tags: expected a list of tags"),
    ],
)
def test_wrong_rules_remove_nothing(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for index in range(3):
        write_run(store, index)
    before = list(store.refs("summary"))
    with pytest.raises(ConfigError, match=message):
        retention_flow.fn(store=str(tmp_path / "store"), **{"keep_last": 1, **given})
    assert list(store.refs("summary")) == before


def test_a_tag_that_no_run_has_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        def __enter__(self) -> Server:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def request(self, *_: object, json: dict[str, Any]) -> Any:
            known = json["flow_runs"]["tags"]["all_"] == ["best"] and json["offset"] == 0
            return SimpleNamespace(json=lambda: [{"description": "net 3bit"}] if known else [])

    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: Server())
    assert runs_with_tags(["best"]) == {"net 3bit"}
    with pytest.raises(ConfigError, match="no run on this Prefect server has the tag 'bset'"):
        runs_with_tags(["best", "bset"])

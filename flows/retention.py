"""Flow ``retention``: remove old runs from a store, with all artifacts that the kept runs do not need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.failures import shown_failures
from flows.garbage import collect
from flows.permissions import check_place, is_limited
from flows.pipeline import show
from mlorq.artifacts.locations import resolve_location, url_of_store
from mlorq.artifacts.store import Store
from mlorq.config.run import DEFAULT_STORE, STORE
from mlorq.errors import ConfigError, hide_secrets
from mlorq.numbers import byte_count


def retention_name() -> str:
    """Name of a flow run: the store."""
    return f"retention of {hide_secrets(str(flow_run.parameters.get('store') or 'the default store'))}"


@flow(name="retention", flow_run_name=retention_name, validate_parameters=False, persist_result=False)
def retention_flow(
    store: str = "",
    keep_last: int = 20,
    max_age_days: float | None = None,
    keep_tags: list[str] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Remove runs that no rule keeps, and the artifacts that only they need.

    Args:
        store: URL or path; empty: that of MLORQ_STORE, or .mlorq in the working directory.
        keep_last: number of newest runs to keep, at least 1.
        max_age_days: keep runs that are younger as well; none: age keeps no run.
        keep_tags: keep runs of flow runs that have one of these tags on this server.
        dry_run: only say what would be removed.

    Returns:
        ``{"store", "kept": names of runs, "dry_run", "removed": {"artifacts", "bytes", "left_over"}}``.
    """
    with shown_failures():
        if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
            raise ConfigError(f"keep_last: expected a number of runs, at least 1 (given: {keep_last!r:.60})")
        is_number = isinstance(max_age_days, (int, float)) and not isinstance(max_age_days, bool)
        if max_age_days is not None and not (is_number and 0 < max_age_days < 1e6):
            raise ConfigError(f"max_age_days: expected a number of days above 0 (given: {max_age_days!r:.60})")
        if not isinstance(keep_tags, (list, type(None))) or not all(isinstance(tag, str) for tag in keep_tags or []):
            raise ConfigError(f"keep_tags: expected a list of tags (given: {keep_tags!r:.60})")
        location = resolve_location(url_of_store(store or os.environ.get(STORE) or DEFAULT_STORE), os.getcwd())
        if is_limited():
            check_place("store", location)
        found = Store(location)
        tagged = runs_with_tags(keep_tags or [])
        since = None if max_age_days is None else datetime.now(UTC) - timedelta(days=max_age_days)
        kept, removed = collect(
            found, lambda: kept_runs(created_runs(found), keep_last, since, tagged), "retention", dry_run=dry_run
        )
    verb = "would be removed" if dry_run else "removed"
    line = f"{removed['artifacts']:,} artifacts {verb}: {byte_count(removed['bytes'])}; {len(kept)} runs kept"
    get_run_logger().info("%s: %s", hide_secrets(found.url), line)
    page = "\n".join([f"{line}.", "", *(f"- {name}" for name in kept)])
    show("retention", lambda key: create_markdown_artifact(key=key, markdown=page, description=line))
    return {"store": hide_secrets(found.url), "kept": kept, "dry_run": dry_run, "removed": removed}


def created_runs(store: Store) -> dict[str, datetime]:
    """The runs of a store, each with the time at which it was written.

    Raises:
        StoreError: a run cannot be read; ``mlorq store verify --repair`` removes damaged ones.
    """
    found = {}
    for ref in store.refs("summary"):
        written = datetime.fromisoformat(str((store.manifest(ref) or {})["created"]))
        found[str(store.read_json(ref, "run.json")["run"])] = written if written.tzinfo else written.replace(tzinfo=UTC)
    return found


def kept_runs(
    runs: Mapping[str, datetime], keep_last: int, since: datetime | None, tagged: Iterable[str] = ()
) -> list[str]:
    """Names of the runs to keep, newest first.

    Args:
        runs: all runs, with the time at which each was written.
        keep_last: number of newest runs to keep.
        since: keep all that were written since then; None: none for this reason.
        tagged: keep these as well, if they are in ``runs``.
    """
    newest = sorted(runs, key=lambda name: (runs[name], name), reverse=True)
    tagged = set(tagged)
    return [
        name
        for place, name in enumerate(newest)
        if place < keep_last or (since is not None and runs[name] >= since) or name in tagged
    ]


def runs_with_tags(tags: Iterable[str]) -> set[str]:
    """Names of the runs whose flow runs have one of these tags, by their artifacts ``result`` on this server.

    Raises:
        ConfigError: no run has one of the tags.
    """
    from prefect.client.orchestration import get_client

    found: set[str] = set()
    with get_client(sync_client=True) as client:
        for tag in tags:
            query: dict[str, Any] = {
                "artifacts": {"key": {"any_": ["result"]}},
                "flow_runs": {"tags": {"all_": [tag]}},
                "limit": 200,
                "offset": 0,
            }
            while rows := client.request("POST", "/artifacts/filter", json=query).json():
                found |= {str(row["description"]) for row in rows}
                query["offset"] += len(rows)
            if not query["offset"]:  # a mistyped tag, or another server: nothing is removed on its account
                raise ConfigError(f"keep_tags: no run on this Prefect server has the tag {tag!r}")
    return found

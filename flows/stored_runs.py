"""The runs of a store: finished ones, and allocations alone (``mlorq rebudget --allocate-only``).

An allocation does not hold the name of its model: that of a finished run with the same candidates is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import MlorqError, StoreError

RESULT, ALLOCATION = "run.json", "allocation.json"
SIZES = ("budget_bytes", "bytes", "file_bytes", "float_bytes")
SHOWN = ("run", "model", "budget", *SIZES, "nmse", "metric", "checkpoint")
UNKNOWN = "model"  # in place of the name of a model of which no run is finished


def finished_runs(store: Store, damaged: list[str]) -> Iterator[tuple[ArtifactRef, dict[str, Any]]]:
    """The summaries of finished runs with their result objects.

    Args:
        store: the store.
        damaged: receives the errors of damaged ones.
    """
    for ref in store.refs("summary"):
        try:
            result = store.read_json(ref, RESULT)
            lacks = [name for name in (*SHOWN, "artifacts") if name not in result]
            if lacks:
                raise StoreError(f"{store.uri(ref, RESULT)} lacks {lacks[0]!r}")
            yield ref, result
        except MlorqError as error:
            damaged.append(str(error))


def allocations(store: Store, finished: Sequence[dict[str, Any]], damaged: list[str]) -> list[dict[str, Any]]:
    """The allocations that no finished run has, oldest first: run, model, budget, sizes, predicted cost, date.

    Args:
        store: the store.
        finished: the result objects of its finished runs.
        damaged: receives the errors of damaged ones.
    """
    used = {result["artifacts"]["allocation"]["key"] for result in finished}
    models = {
        made["key"]: result["model"]
        for result in finished
        for made in result["artifacts"].values()
        if made["step"] == "candidates"
    }
    found = []
    for ref in (ref for step in ("allocate", "joint") for ref in store.refs(step) if ref.key not in used):
        try:
            info, manifest = store.read_json(ref, ALLOCATION), store.manifest(ref) or {}
            inputs = manifest.get("details", {}).get("inputs", {}).values()
            model = next((models[one["key"]] for one in inputs if one.get("key") in models), None)
            sizes = {name: info[name] for name in ("budget", "budget_bytes", "bytes", "predicted_cost")}
        except (MlorqError, KeyError) as error:
            damaged.append(str(error))
            continue
        run = f"{model or UNKNOWN}-{info['budget']}-{ref.key[:8]}"
        found.append({"run": run, "model": model, **sizes, "created": manifest.get("created", "")})
    return sorted(found, key=lambda row: str(row["created"]))

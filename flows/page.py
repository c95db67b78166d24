"""The page of a run: written to the store when a run ends, or when ``mlorq report`` first asks for it.

It is not a step's artifact: it shows times, what was reused, and how to repeat the run, which are no function of the
run's key. Its folder in the store, ``report/<key>/``, also has ``made.json``, from which later pages show the same.
"""

from __future__ import annotations

import platform
import shlex
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

import mlorq
from flows.ledger import Account
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, Store, json_bytes
from mlorq.config.budget import Budget
from mlorq.config.run import RunConfig
from mlorq.errors import MlorqError
from mlorq.evaluation.page import Made, Searched, Stage, render_report
from mlorq.numbers import duration
from steps.artifacts import DEPTH, ArtifactReader
from steps.summary import seconds_of

ARTIFACT = "report"  # its step name in the store
PAGE, MADE = "report.html", "made.json"
PACKAGES = ("torch", "transformers", "timm", "numpy", "prefect")


def page_ref(summary: ArtifactRef) -> ArtifactRef:
    """Where the page of a run is in the store."""
    return ArtifactRef(ARTIFACT, digest_json({"summary": summary.key, "version": 1}))


def keep_page(
    store: Store,
    summary: ArtifactRef,
    result: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
) -> ArtifactRef:
    """Write a run's page to the store unless it exists.

    Args:
        store: of the run.
        summary: the run's summary.
        result: its result object.
        made: of ``made_json``, if this process made the run.

    Raises:
        StoreError: the store cannot be written.
    """
    ref = page_ref(summary)
    if not store.exists(ref):
        made = made or {}
        page = render_report(result, **page_parts(store, summary, result), made=made_of(store, summary, result, made))
        store.write(ARTIFACT, ref.key, {PAGE: page, MADE: json_bytes(made)}, details={"runs": [result["run"]]})
    return ref


def made_json(config: RunConfig, budget: Budget, account: Account) -> dict[str, Any]:
    """How this process makes a run: its configuration, the reused steps, and the versions of software.

    Args:
        config: of the run.
        budget: of the run. Without a configuration if it has no text that gives the same bytes (in comparisons).
        account: of the run.
    """
    repeatable = budget.kind != "layers"
    return {
        "config": config.model_dump(mode="json") | {"budget": budget.text} if repeatable else None,
        "folder": config.folder if repeatable else "",
        "reused": account.reused_by_step,
        "seconds": account.seconds,
        "seconds_reused": account.seconds_reused,
        "versions": versions(),
    }


@cache
def versions() -> dict[str, str]:
    """Versions of mlorq, Python and the packages that results depend on, and the platform."""
    found = {"mlorq": mlorq.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"on": platform.platform(terse=True)}


def known_made(store: Store, summary: ArtifactRef) -> dict[str, Any]:
    """What the store knows of how a run was made; empty if no flow made it."""
    ref = page_ref(summary)
    found: dict[str, Any] = store.read_json(ref, MADE) if store.exists(ref) else {}
    return found


def made_of(store: Store, summary: ArtifactRef, result: Mapping[str, Any], made: Mapping[str, Any]) -> Made:
    """How a run was made, for its page.

    Args:
        store: of the run.
        summary: the run's summary.
        result: its result object.
        made: of ``made_json``; empty if it is not known.
    """
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for ref in {ArtifactRef.from_json(value) for value in result["artifacts"].values()}:
        counts[ref.step] += 1
        seconds[ref.step] += seconds_of(store, ref)
    known, now, before = made.get("reused"), made.get("seconds"), made.get("seconds_reused")
    if now is not None and before is not None:
        seconds = defaultdict(float, now)
    order = dict.fromkeys([*STAGES, *sorted(counts)])
    stages = [
        Stage(
            name,
            counts[name],
            None if known is None else int(known.get(name, 0)),
            float(seconds[name]),
            float((before or {}).get(name, 0.0)),
        )
        for name in order
        if counts[name]
    ]
    took = duration(sum(stage.seconds for stage in stages))
    lines = [f"Computing took {took} in all, in this run or earlier ones."]
    if before is not None:
        lines = [f"Computing took {took}; what was reused had taken {duration(sum(one.before for one in stages))}."]
    if known is not None:
        lines.append(f"{sum(stage.reused or 0 for stage in stages)} of {sum(counts.values())} steps were reused.")
    created = str((store.manifest(summary, missing_ok=True) or {}).get("created", ""))
    config = made.get("config")
    return Made(
        stages,
        created[:16].replace("T", " "),
        lines,
        f"mlorq compress run.yaml --budget {shlex.quote(config['budget'])}" if config else "",
        yaml.safe_dump(config, sort_keys=False) if config else "",
        str(made.get("folder") or ""),
        made.get("versions") or {},
    )


# In the order of a run.
STAGES = (
    "layers", "baseline", "embeddings", "activations", "capture", "candidates", "sensitivity", "width_costs",
    "table_costs", "allocate", "joint", "round", "reconstruct", "tune", "compressed", "evaluate", "calibration",
    "export",
)  # fmt: skip


def page_parts(store: Store, summary: ArtifactRef, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the search found, for a page's charts; if its artifacts are missing or of earlier versions, the picture.

    Args:
        store: of the run.
        summary: the run's summary.
        result: its result object.
    """
    artifacts = ArtifactReader(store)
    refs = {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items()}
    try:
        fronts = {
            row["layer"]: (
                artifacts.table(refs[f"candidates/{row['layer']}"], "candidates.parquet"),
                artifacts.table(refs[f"sensitivity/{row['layer']}"], "sensitivity.parquet"),
            )
            for row in result["allocation"]
        }
        params = {layer.name: layer.params for layer in artifacts.layers(refs["layers"]).layers}
        checked = refs.get("calibration")
        depth = artifacts.json(checked, DEPTH) if checked and DEPTH in artifacts.sizes(checked) else {}
    except (MlorqError, KeyError):
        return {"picture": store.read_bytes(summary, "report.png")}
    return {"searched": Searched(fronts, params, depth)}

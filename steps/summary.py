"""Step ``summary``: the run's result as one JSON object, with pictures of it, and the keys of all it was made from.

This is what ``mlorq runs`` lists and what ``--json`` prints. It is an artifact like the others, so that a run that
computes nothing writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mlorq.artifacts.store import ArtifactRef, Store, json_bytes
from mlorq.evaluation.report import front_picture, render_report
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def spec(bench: Workbench, artifacts: dict[str, ArtifactRef], budget: str) -> StepSpec:
    """Depends on every artifact of the run."""
    return STEP.spec({"model": bench.config.model.display_name, "budget": budget}, dict(artifacts), device=False)


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    store = bench.store
    info = store.read_json(spec.artifact("allocation"), "allocation.json")
    rows = store.read_table(spec.artifact("allocation"), "allocation.parquet").to_pylist()
    sizes = store.read_json(spec.artifact("checkpoint"), "config.json")["sizes"]
    manifest = store.manifest(spec.artifact("checkpoint")) or {"files": {}}
    float_info = store.read_json(spec.artifact("baseline"), "metrics.json")
    metrics = store.read_json(spec.artifact("evaluation"), "metrics.json")
    result = allocation_json(bench, spec.artifact("allocation"), info, rows)
    result |= {
        "solver": {**info["solver"], "seconds": None},
        "run": f"{spec.params['model']}-{spec.params['budget']}-{spec.key[:8]}",
        "bytes": sizes["bytes"],
        "rest_bytes": sizes["rest_bytes"],
        "overhead_bytes": sizes["overhead_bytes"],
        "file_bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "float_bytes": sizes["float_bytes"],
        **_embeddings(spec, store, sizes),
        "nmse": metrics["nmse"],
        "nmse_data": metrics["nmse_data"],
        "metric": _metric(float_info, metrics),
        "metrics": {"float": float_info["metrics"], "compressed": metrics["metrics"]},
        "artifacts": {role: ref.to_json() for role, ref in spec.inputs.items() if isinstance(ref, ArtifactRef)},
    }
    fronts = {
        row["layer"]: (
            store.read_table(spec.artifact(f"candidates/{row['layer']}"), "candidates.parquet"),
            store.read_table(spec.artifact(f"sensitivity/{row['layer']}"), "sensitivity.parquet"),
        )
        for row in rows
    }
    params = {layer.name: layer.params for layer in bench.layer_list(spec.artifact("layers")).layers}
    picture = front_picture(rows, fronts, params, result)
    return {
        "run.json": json_bytes(result),
        "report.png": picture,
        "report.html": render_report(result, picture),
    }


def allocation_json(
    bench: Workbench, allocation: ArtifactRef, info: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The result object as far as the allocation alone decides it; the rest is null."""
    name = bench.config.model.display_name
    return {
        "run": f"{name}-{info['budget']}-{allocation.key[:8]}",
        "model": name,
        "budget": info["budget"],
        "budget_bytes": info["budget_bytes"],
        "bytes": info["bytes"],
        "rest_bytes": None,
        "file_bytes": None,
        "float_bytes": None,
        "smallest_bytes": info["smallest_bytes"],
        "predicted_cost": info["predicted_cost"],
        "measured_cost": info.get("measured_cost"),
        **_activations(bench, info),
        "nmse": None,
        "metric": None,
        "allocation": rows,
        "seconds": {},
        "checkpoint": None,
        "solver": {**info["solver"], "seconds": made_in(bench.store, allocation)},
    }


def _embeddings(spec: StepSpec, store: Store, sizes: dict[str, int]) -> dict[str, Any]:
    """What became of the embedding tables; nothing where they were left alone."""
    ref = spec.optional_artifact("embeddings")
    if ref is None:
        return {}
    return {
        "embedding_bytes": sizes.get("embedding_bytes", 0),
        "embeddings": store.read_json(ref, "embeddings.json"),
    }


def _activations(bench: Workbench, info: dict[str, Any]) -> dict[str, Any]:
    """How activations are quantized; nothing where they stay float."""
    chosen = bench.config.activations
    if chosen is None:
        return {}
    decided = {name: info[name] for name in ("compute", "bit_operations", "activation_bits") if name in info}
    return {"activations": {"bits": chosen.bits, "method": chosen.method, **decided}}


def _metric(float_info: dict[str, Any], compressed: dict[str, Any]) -> dict[str, Any] | None:
    """The task's metric: the named one, or the first that the user's function returned."""
    name = float_info["name"] or next(iter(float_info["metrics"]), None)
    if name is None:
        return None
    return {
        "name": name,
        "float": float_info["metrics"].get(name),
        "compressed": compressed["metrics"].get(name),
    }


def read(store: Store, ref: ArtifactRef) -> dict[str, Any]:
    """A run's result object, completed with what is no part of an artifact's bytes: times, and where things are.

    ``seconds`` are those that the artifacts took when they were made, summed by step.

    Raises:
        StoreError: the summary is not there or damaged.
    """
    result: dict[str, Any] = store.read_json(ref, "run.json")
    artifacts = {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items()}
    seconds: dict[str, float] = defaultdict(float)
    for made in artifacts.values():
        seconds[made.step] += made_in(store, made)
    result["seconds"] = {step: round(value, 3) for step, value in seconds.items()}
    # Of the step that solved the program: where an allocation was refined, of the one that it was found from.
    result["solver"]["seconds"] = made_in(store, artifacts.get("program", artifacts["allocation"]))
    result["checkpoint"] = store.uri(artifacts["checkpoint"])
    return {"embedding_bytes": 0, "embeddings": None} | result


def made_in(store: Store, ref: ArtifactRef) -> float:
    """Seconds that an artifact took when it was made; 0 where it is gone."""
    manifest = store.manifest(ref, missing_ok=True) or {}
    return float(manifest.get("seconds") or 0.0)


STEP = Step("summary", 2, run)

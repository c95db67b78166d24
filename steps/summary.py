"""Step ``summary``: the run's result as one JSON object with a picture, and the keys of all its artifacts.

``mlorq runs`` lists these results, and ``--json`` prints one. The result is an artifact like the others: a run that
computes nothing writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlorq.artifacts.store import ArtifactRef, Store, json_bytes
from mlorq.checkpoint.places import DESCRIPTION, FILES
from mlorq.evaluation.report import front_picture
from mlorq.models.layer_list import still_float
from steps import export
from steps.artifacts import CALIBRATION, ArtifactReader
from steps.base import Needs, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import roles_of
from steps.session import Session


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations in a result: their bit-width, and the method that quantizes them."""

    bits: int
    method: str


@dataclass(frozen=True)
class Params:
    """The model's name, the budget as written in the configuration, and how activations are quantized, if they are."""

    model: str
    budget: str
    activations: QuantizedActivations | None = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Every artifact of the run."""

    layers: ArtifactRef
    plan: ArtifactRef | None = None
    widths: ArtifactRef | None = None
    embeddings: ArtifactRef | None = None
    table_costs: ArtifactRef | None = None
    capture: ArtifactRef
    allocation: ArtifactRef
    checkpoint: ArtifactRef
    baseline: ArtifactRef
    evaluation: ArtifactRef
    calibration: ArtifactRef
    candidates: Mapping[str, ArtifactRef]
    sensitivity: Mapping[str, ArtifactRef]
    round: Mapping[str, ArtifactRef]
    reconstruct: Mapping[str, ArtifactRef]
    tune: ArtifactRef | None = None
    exports: tuple[ArtifactRef, ...] = ()


def params_of(session: Session, budget: str) -> Params:
    """The part of a result that comes from the configuration."""
    chosen = session.config.activations
    activations = None if chosen is None else QuantizedActivations(chosen.bits, chosen.method)
    return Params(session.config.model.display_name, budget, activations)


def spec(session: Session, inputs: Inputs, budget: str) -> StepSpec:
    """Depends on every artifact of the run."""
    return STEP.spec(params_of(session, budget), inputs, needs=Needs(device=False))


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    artifacts = context.artifacts
    info = artifacts.json(inputs.allocation, "allocation.json")
    rows = artifacts.table(inputs.allocation, "allocation.parquet").to_pylist()
    sizes = artifacts.json(inputs.checkpoint, DESCRIPTION)["sizes"]
    float_info = artifacts.json(inputs.baseline, "metrics.json")
    metrics = artifacts.json(inputs.evaluation, "metrics.json")
    result = _allocation_json(params, inputs.allocation, info, rows)
    result |= {
        "solver": {**info["solver"], "seconds": None},
        "run": f"{params.model}-{params.budget}-{STEP.ref(params, inputs).key[:8]}",
        "bytes": sizes["bytes"],
        "rest_bytes": sizes["rest_bytes"],
        "overhead_bytes": sizes["overhead_bytes"],
        "file_bytes": sum(artifacts.sizes(inputs.checkpoint)[name] for name in FILES),  # without the tokenizer's
        "float_bytes": sizes["float_bytes"],
        **_embeddings(artifacts, inputs.embeddings, sizes),
        "left_float": _left_float(artifacts, inputs),
        **_exports(artifacts, inputs.exports),
        "nmse": metrics["nmse"],
        "nmse_data": metrics["nmse_data"],
        "metric": _metric(float_info, metrics),
        "metrics": {"float": float_info["metrics"], "compressed": metrics["metrics"]},
        "calibration": artifacts.json(inputs.calibration, CALIBRATION),
        "artifacts": {role: ref.to_json() for role, ref in roles_of(inputs).items() if isinstance(ref, ArtifactRef)},
    }
    fronts = {
        row["layer"]: (
            artifacts.table(inputs.candidates[row["layer"]], "candidates.parquet"),
            artifacts.table(inputs.sensitivity[row["layer"]], "sensitivity.parquet"),
        )
        for row in rows
    }
    weights = {layer.name: layer.params for layer in artifacts.layers(inputs.layers).layers}
    return {"run.json": json_bytes(result), "report.png": front_picture(rows, fronts, weights, result)}


def allocation_json(session: Session, allocation: ArtifactRef) -> dict[str, Any]:
    """The result object of an allocation alone; what depends on later steps is null."""
    info = session.artifacts.json(allocation, "allocation.json")
    rows = session.artifacts.table(allocation, "allocation.parquet").to_pylist()
    result = _allocation_json(params_of(session, info["budget"]), allocation, info, rows)
    result["solver"]["seconds"] = seconds_of(session.store, allocation)
    return result


def _allocation_json(
    params: Params, allocation: ArtifactRef, info: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "run": f"{params.model}-{info['budget']}-{allocation.key[:8]}",
        "model": params.model,
        "budget": info["budget"],
        "budget_bytes": info["budget_bytes"],
        "bytes": info["bytes"],
        "rest_bytes": None,
        "file_bytes": None,
        "float_bytes": None,
        "smallest_bytes": info["smallest_bytes"],
        "predicted_cost": info["predicted_cost"],
        **({"memory": info["memory"]} if "memory" in info else {}),
        **_activations(params.activations, info),
        "nmse": None,
        "metric": None,
        "allocation": rows,
        "seconds": {},
        "checkpoint": None,
        "solver": {**info["solver"], "seconds": None},
    }


def _embeddings(artifacts: ArtifactReader, ref: ArtifactRef | None, sizes: dict[str, int]) -> dict[str, Any]:
    """The quantized embedding tables; empty if tables stay float."""
    if ref is None:
        return {}
    return {"embedding_bytes": sizes.get("embedding_bytes", 0), "embeddings": artifacts.json(ref, "embeddings.json")}


def _left_float(artifacts: ArtifactReader, inputs: Inputs) -> list[dict[str, Any]]:
    """Layers and other weights that stay float, each with its bytes and the reason."""
    listed = artifacts.layers(inputs.layers)
    tables: dict[str, Any] = {"tables": [], "skipped": []}
    if inputs.embeddings is not None:
        tables = artifacts.json(inputs.embeddings, "embeddings.json")
    quantized = {row["table"] for row in tables["tables"]}
    reasons = {row["table"]: row["reason"] for row in tables["skipped"]}
    return [one._asdict() for one in still_float((*listed.skipped, *listed.others), quantized, reasons)]


def _exports(artifacts: ArtifactReader, refs: Sequence[ArtifactRef]) -> dict[str, Any]:
    """The exported files; empty if nothing is exported."""
    found = []
    for ref in refs:
        described = artifacts.json(ref, export.ABOUT)
        sizes = {name: size for name, size in artifacts.sizes(ref).items() if name.startswith(f"{export.FILES}/")}
        files = [{"name": name.removeprefix(f"{export.FILES}/"), "bytes": size} for name, size in sizes.items()]
        found.append(described | {"bytes": sum(sizes.values()), "files": files})
    return {"exports": found} if found else {}


def _activations(chosen: QuantizedActivations | None, info: dict[str, Any]) -> dict[str, Any]:
    """How activations are quantized; empty if they stay float."""
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
    """A run's result object, completed with times and locations, which are not part of an artifact's content.

    ``seconds`` is the time that computing the artifacts took, now or earlier, summed by step.

    Raises:
        StoreError: the summary is missing or damaged.
    """
    result: dict[str, Any] = store.read_json(ref, "run.json")
    artifacts = {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items()}
    seconds: dict[str, float] = defaultdict(float)
    for made in artifacts.values():
        seconds[made.step] += seconds_of(store, made)
    result["seconds"] = {step: round(value, 3) for step, value in seconds.items()}
    result["solver"]["seconds"] = seconds_of(store, artifacts["allocation"])
    result["checkpoint"] = store.uri(artifacts["checkpoint"])
    for index, exported in enumerate(result.setdefault("exports", [])):
        ref = artifacts[f"exports/{index}"]
        exported["uri"] = store.uri(ref, export.FILES)
        for file in exported["files"]:
            file["uri"] = store.uri(ref, export.FILES, file["name"])
    return {"embedding_bytes": 0, "embeddings": None, "left_float": [], "calibration": None} | result


def seconds_of(store: Store, ref: ArtifactRef) -> float:
    """Time in seconds that computing an artifact took; 0 if it is no longer in the store."""
    manifest = store.manifest(ref, missing_ok=True) or {}
    return float(manifest.get("seconds") or 0.0)


STEP = Step("summary", 8, Params, Inputs, run)

"""The steps of a run, one file per step: parameters, inputs, output. ``python -m steps NAME --spec URI`` runs one."""

from __future__ import annotations

from typing import Any

from steps import (
    activations,
    allocate,
    baseline,
    candidates,
    capture,
    embeddings,
    evaluate,
    joint,
    layers,
    pack,
    reconstruct,
    refine,
    rounding,
    sensitivity,
    summary,
    tune,
    width_costs,
)
from steps.base import Step

REGISTRY: dict[str, Step[Any, Any]] = {
    module.STEP.name: module.STEP
    for module in (
        layers,
        activations,
        embeddings,
        capture,
        candidates,
        sensitivity,
        allocate,
        joint,
        refine,
        rounding,
        reconstruct,
        tune,
        width_costs,
        pack,
        baseline,
        evaluate,
        summary,
    )
}

"""Step ``layers``: which layers the model has to compress (``layers.parquet``), its blocks and what is skipped."""

from __future__ import annotations

from mlorq.artifacts.store import json_bytes, table_bytes
from mlorq.models.layers import LayerList, find_layers, layers_table
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def spec(bench: Workbench) -> StepSpec:
    """Depends on the model, one batch of the calibration data, and the layer patterns."""
    search = bench.config.search
    return STEP.spec(
        {"include": search.include, "exclude": search.exclude},
        {"model": bench.float_model.key, "calibration": bench.calibration.key},
    )


def discover(bench: Workbench) -> LayerList:
    """List the layers without reading or writing the store (for a dry run)."""
    search = bench.config.search
    return find_layers(
        bench.float_model,
        bench.calibration.batches[0],
        include=search.include,
        exclude=search.exclude,
        device=bench.device,
    )


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    found = discover(bench)
    return {
        "layers.parquet": table_bytes(layers_table(found.layers)),
        "model.json": json_bytes(
            {
                "architecture": bench.float_model.architecture,
                "blocks": found.blocks,
                "skipped": [list(item) for item in found.skipped],
            }
        ),
    }


STEP = Step("layers", 2, run)

"""Intra-layer search: bytes, local costs and Pareto front of all candidates of a layer (METHOD 2, 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from mlorq.artifacts.schemas import CANDIDATES
from mlorq.codecs.base import Storage
from mlorq.costs.pareto import pareto_front
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FIELDS, FORMS, Shape, enumerate_candidates, held, local_cost_array
from mlorq.registry import Settings


def candidate_table(fit: LayerFit, shape: Shape, settings: Mapping[str, Settings], storage: Storage) -> pa.Table:
    """All candidates of a layer with bytes, local cost and front membership (``schemas.CANDIDATES``).

    Candidates of uniform forms are always on the front, so that they are measured. If a runtime is chosen, the front
    has its memory as a third measure.

    Args:
        fit: fit of the layer's candidates.
        shape: shape of its weight.
        settings: settings of every form that the layer may take, by the form's name.
        storage: how matrices are stored and counted.
    """
    found = enumerate_candidates(shape, settings, storage)
    candidates, sizes = [candidate for candidate, _ in found], [size for _, size in found]
    residency, memory = storage.residency, None
    unknown: list[int | None] = [None] * len(candidates)
    if residency is not None:
        memory = [held(one, shape, residency, storage.zero_point).bytes for one in candidates]
    costs = local_cost_array(fit, candidates, sizes, memory)
    front = pareto_front(costs, np.array(sizes), *([] if memory is None else [np.array(memory)]))
    front |= [FORMS[candidate.form].uniform for candidate in candidates]
    return pa.table(
        {
            "candidate_id": [candidate.candidate_id for candidate in candidates],
            **{name: [getattr(candidate, name) for candidate in candidates] for name in FIELDS},
            "bytes": sizes,
            "memory": memory or unknown,
            "local_cost": costs,
            "on_front": front,
        },
        schema=CANDIDATES,
    )


def spread(count: int, points: int) -> Sequence[int]:
    """At most ``points`` indices spread evenly over ``0 … count - 1``, both ends included."""
    if count <= points:
        return range(count)
    return sorted(set(np.round(np.linspace(0, count - 1, points)).astype(int).tolist()))

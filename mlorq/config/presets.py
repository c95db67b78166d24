"""Presets: defaults of ``search`` and ``rounding``; whatever a configuration writes out wins over them."""

from __future__ import annotations

from typing import Any, Literal

from mlorq.fitting.settings import PERCENTILES

Preset = Literal["best", "quick", "paper"]

DEFAULT_PRESET: Preset = "best"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Second moments, three forms, closed forms, costs measured where they decide, and block reconstruction (METHOD 7).
    "best": {
        "search": {
            "samples": 32,
            "hessian_samples": 32,
            "hessian_probes": 8,
            "hessian_min_probes": 8,
            "hessian_mode": "probes",
            "metric": "moments",
            "token_weights": 0.5,  # roots: with all of a weight too few tokens decide, and their noise is fitted
            "forms": ["Q", "LR", "QLR"],
            "sensitivity": "auto",
            "points": 6,
            "rounds": 3,
            "zero_point": "codes",
            "percentiles": PERCENTILES,
        },
        "rounding": {"method": "block", "iterations": 200, "tuning": 150},
    },
    # The published method at a price that fits a CPU: fewer probes and LRA iterations, integer zero-points that
    # fit the codes, and a percentile grid that reaches the Gaussian optimum of 2 and 3 bits.
    "quick": {
        "search": {
            "samples": 64,
            "hessian_samples": 32,
            "hessian_probes": 32,
            "hessian_mode": "auto",
            "zero_point": "codes",
            "percentiles": PERCENTILES,
        },
        "rounding": {"method": "lra", "iterations": 500},
    },
    # arXiv 2507.09616 (see METHOD 3-6): the numbers of the published experiments.
    "paper": {
        "search": {
            "samples": 1024,
            "hessian_samples": 32,
            "hessian_probes": 100,
            "hessian_mode": "probes",
            "zero_point": "int16",
            "percentiles": [0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0],
            "time_limit": 120.0,
        },
        "rounding": {"method": "lra", "iterations": 20_000},
    },
}

"""Presets: defaults of ``search`` and ``rounding``; explicit values of a configuration win over them."""

from __future__ import annotations

from typing import Any, Literal

from mlorq.fitting.settings import PERCENTILES

Preset = Literal["best", "fast", "quick", "paper"]

DEFAULT_PRESET: Preset = "best"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "search": {
            "samples": 32,
            "hessian_samples": 256,
            "hessian_probes": 2,
            "hessian_min_probes": 2,
            "hessian_mode": "probes",
            "metric": "moments",
            "token_weights": 0.5,
            "forms": ["Q", "TCQ"],
            "bits": [8],
            "sensitivity": "closed_form",
            "zero_point": "codes",
            "percentiles": PERCENTILES,
        },
        "rounding": {"method": "closed_form"},
    },
    # Second moments, three forms, closed-form solutions, measurements of the decisive costs only, and block
    # reconstruction (METHOD 7).
    "best": {
        "search": {
            "samples": 32,
            "hessian_samples": 32,
            "hessian_probes": 8,
            "hessian_min_probes": 8,
            "hessian_mode": "probes",
            "metric": "moments",
            "token_weights": 0.5,  # square root: at power 1 a few tokens dominate and their noise is fitted
            "forms": ["Q", "LR", "QLR"],
            "sensitivity": "closed_form",
            "zero_point": "codes",
            "percentiles": PERCENTILES,
        },
        "rounding": {"method": "block", "iterations": 200, "tuning": 150},
    },
    # The published method at a cost that suits a CPU: fewer probes and LRA iterations, zero-points within the range
    # of the codes, and a percentile grid that includes the optimum of a Gaussian at 2 and 3 bits.
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
    # The settings of the published experiments (arXiv 2507.09616; METHOD 3-6).
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

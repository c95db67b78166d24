"""Presets: defaults of ``search`` and ``rounding``; explicit values of a configuration win over them."""

from __future__ import annotations

from typing import Any, Literal

from mlorq.fitting.settings import PERCENTILES

Preset = Literal["best", "fast", "integer", "quick", "paper"]

DEFAULT_PRESET: Preset = "best"

# Second moments of inputs and output gradients, and one measured cost per layer (METHOD 7). G needs samples rather than
# probes: its rows guide the errors of trellis codes.
_MOMENTS: dict[str, Any] = {
    "samples": 32,
    "hessian_samples": 256,
    "hessian_probes": 2,
    "hessian_min_probes": 2,
    "hessian_mode": "probes",
    "metric": "moments",
    "token_weights": 0.5,  # square root: at power 1 a few tokens dominate and their noise is fitted
    "sensitivity": "closed_form",
    "zero_point": "codes",
    "percentiles": PERCENTILES,
}
# Affine codes serve layers with too few rows for a trellis, and budgets above 6 bits; factors serve models of low rank.
_TRELLIS: dict[str, Any] = {**_MOMENTS, "forms": ["Q", "LR", "TCQ"], "factor_bits": [4, 6]}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Trellis codes, mixed over layers, then training of scales, biases and norms (METHOD 7, 10).
    "best": {
        "search": _TRELLIS,
        "rounding": {"method": "block", "iterations": 200, "tuning": 150},
    },
    # The same without training.
    "fast": {
        "search": _TRELLIS,
        "rounding": {"method": "closed_form"},
    },
    # Only forms that integer kernels run: affine codes, factors of them, and their sum (METHOD 7).
    "integer": {
        "search": {**_MOMENTS, "forms": ["Q", "LR", "QLR"], "factor_bits": [4, 6]},
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

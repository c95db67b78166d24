"""Configuration keys of fits: everything that determines the matrices of a given candidate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlorq.field_types import Percentiles
from mlorq.registry import Settings

PERCENTILES = [0.92, 0.94, 0.96, 0.97, 0.98, 0.99, 0.995, 0.9995, 0.9999, 1.0]

Split = Literal["U_SV", "US_V"]


class FitSettings(Settings):
    """How a candidate's matrices are fitted."""

    metric: Literal["hessian", "moments"] = Field(
        "hessian",
        description="metric of fits and local costs: hessian (paper), moments (input and output-gradient covariances)",
    )
    factor_split: Split = Field("U_SV", description="which factor carries the singular values")
    zero_point: Literal["codes", "int16"] = Field(
        "codes", description="codes: ranges contain 0 and zero-points are codes; int16: any zero-point (the paper)"
    )
    rotation: int | None = Field(
        0, ge=0, lt=2**31, description="trellis codes: seed of the rotation of a weight's columns; null: no rotation"
    )
    percentiles: Percentiles = Field(PERCENTILES, description="upper percentiles p of the ranges (1-p, p) tried")

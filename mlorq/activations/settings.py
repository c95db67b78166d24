"""Configuration keys shared by all activation quantization methods (METHOD 8)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mlorq.activations.compute import checked_compute
from mlorq.field_types import BitWidths, Percentiles
from mlorq.registry import Settings


class ActivationSettings(Settings):
    """Quantized activations (docs/METHOD.md, 8)."""

    bits: int = Field(4, ge=2, le=8, description="bit-width of layers' inputs and of the operands of products")
    method: str = Field("normalized")  # its choices and their descriptions come from the registry
    products: bool = Field(True, description="quantize the operands of attention's two matrix products too")
    first_bits: int = Field(8, ge=2, le=8, description="bit-width of pixels or amplitudes before a first convolution")
    mixed: bool = Field(
        False,
        description="give smaller tensors more bits: as many as keep size x bits within that of the largest",
    )
    choices: BitWidths = Field(
        [], description="bit-widths to choose from for each tensor, together with the layers' candidates; needs compute"
    )
    compute: Annotated[str, AfterValidator(checked_compute)] | None = Field(
        None,
        description='with choices: largest number of bit operations per sample, as in "4x4" (that of 4-bit weights '
        'and activations) or "20G"',
    )
    percentiles: Percentiles = Field(
        [0.999, 0.9999, 0.99999, 1.0], description="upper percentiles p of the ranges (1-p, p) tried"
    )
    samples: int = Field(32, ge=1, description="calibration samples on which ranges are searched")

    def check(self) -> None:
        """Check that widths, choices and the compute budget are consistent.

        Raises:
            ValueError: they are not.
        """
        if bool(self.choices) != (self.compute is not None):
            raise ValueError("choices and compute belong together: set both or neither")
        if self.choices and self.bits not in self.choices:
            raise ValueError(f"bits, at which LayerNorms are folded, must be one of choices {self.choices}")
        if self.choices and self.mixed:
            raise ValueError("mixed and choices both decide bit-widths: set only one of them")


class RectifyingSettings(ActivationSettings):
    """Keys of methods that replace GELU by ReLU (``rectify``)."""

    mlp_iterations: int = Field(500, ge=1, description="steps per MLP (paper: 20000)")
    mlp_rate: float = Field(1e-3, gt=0, description="step size of the weights of an MLP (paper: 4e-5)")
    mlp_weights: Literal["perturbation", "equal"] = Field(
        "perturbation",
        description="entries of an MLP's output are weighted by a perturbation Hessian (arXiv 2504.02508), or equally",
    )

"""The section ``target``: the runtime that a compressed model is meant for.

The search then uses the forms and widths that this runtime computes with, and a budget can bound its memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mlorq.codecs.base import Residency
from mlorq.config.compose import Choice, composed, part, require_known
from mlorq.registry import Settings
from mlorq.runtimes import RUNTIMES


class TargetConfig(Choice):
    """The runtime that the compressed model is meant for (docs/DEVICES.md)."""

    chooser = "runtime"
    registry = RUNTIMES

    runtime: str = Field(description="runtime, as in mlorq.load")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A name alone stands for the runtime with its defaults."""
        return {"runtime": value} if isinstance(value, str) else value

    @property
    def own(self) -> Settings:
        """The options of the runtime as a target."""
        chosen = RUNTIMES[self.runtime].as_target
        assert chosen is not None
        return part(self, chosen)

    def residency(self, *, static: bool = False) -> Residency:
        """How the runtime holds the weights of linear layers.

        Args:
            static: whether their inputs are quantized with static ranges.
        """
        runtime = RUNTIMES[self.runtime]
        found, least = runtime.residency(self.own), runtime.integer_bits if static else 0
        return replace(found, code_bits=tuple(bits for bits in found.code_bits if bits >= least))

    @property
    def text(self) -> str:
        """For display: ``onnxruntime, precision fast``."""
        options = (f"{name} {value}" for name, value in self.own.model_dump().items())
        return ", ".join([self.runtime, *options])

    def check(self) -> None:
        """Check that the runtime has the options that are set.

        Raises:
            ValueError: it does not have one.
        """
        require_known(self, type(self.own), f"target {self.runtime}")


class _Options(NamedTuple):
    name: str
    settings: type[Settings]


def target_section() -> type[TargetConfig]:
    """The class of ``target``, with the options of all runtimes that can be one."""
    options = [_Options(one.name, one.as_target) for one in RUNTIMES if one.as_target is not None]
    names: Any = Literal[tuple(option.name for option in options)]
    return composed(TargetConfig, options, {"runtime": names})

"""Target ``onnx``: one file of standard operators that decode the packed codes when a runtime loads it.

The file has the checkpoint's size. Everything that a caller needs is in its metadata: names of inputs and outputs, the
preparation of images, onnxruntime's session options, and, for ``fast``, the NMSE that it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mlorq.errors import CheckpointError, ModelError
from mlorq.export_targets.base import TARGETS
from mlorq.export_targets.graph_files import GraphConfig, GraphSettings, GraphTarget
from mlorq.numbers import byte_count
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

OPSET = 21  # the first with 4-bit integers
LARGEST_FILE = 2**31 - 1  # bytes of a protobuf message


class OnnxConfig(GraphConfig):
    """Options that a run's configuration may set."""

    precision: Literal["exact", "fast"] = Field(
        "exact", description="exact: the outputs of mlorq.load; fast: products by 8-bit integers"
    )
    opset: int = Field(OPSET, description="version of the operators")

    def check(self) -> None:
        """Check the opset.

        Raises:
            ValueError: it is not supported.
        """
        if self.opset != OPSET:
            raise ValueError(
                f"opset {self.opset} is not supported: leave it out, for {OPSET}, which has 4-bit integers"
            )


class OnnxSettings(OnnxConfig, GraphSettings):
    """Options of the target."""


class Onnx(GraphTarget[OnnxSettings]):
    """An ONNX graph."""

    name = "onnx"
    title = "graph for onnxruntime and other software (one .onnx file)"
    settings = OnnxSettings
    configured: ClassVar[type[Settings] | None] = OnnxConfig
    suffixes = (".onnx",)
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    seconds: ClassVar[tuple[float, float]] = (16.0, 1.1e-7)  # measured: MiniLM and ViT-Base, 2 cores

    def contents(
        self, output: str, module: nn.Module, architecture: Mapping[str, Any], settings: OnnxSettings
    ) -> dict[str, bytes]:
        return {output: graph_bytes(module, architecture, settings)}

    def summary(self, files: Sequence[str]) -> dict[str, Any]:
        """Precision, bytes, and the difference from the torch model on the example inputs."""
        from mlorq.export_targets.onnx_graph.session import read_metadata

        about = read_metadata(files[0])
        keys = ("precision", "difference", "nmse_added", "session_options")
        return {"bytes": about["bytes"]} | {key: about[key] for key in keys}


def graph_bytes(module: nn.Module, architecture: Mapping[str, Any], settings: OnnxSettings) -> bytes:
    """The file of a compressed module, compared with the module on the example inputs.

    Args:
        module: the compressed module, on the CPU.
        architecture: its architecture, as in ``config.json``.
        settings: options of the target.

    Raises:
        CheckpointError: the graph cannot be exported, is too large, or differs from the module.
    """
    from mlorq.activations.plan import quantizers_of
    from mlorq.export_targets.onnx_graph.build import build, set_metadata
    from mlorq.export_targets.onnx_graph.session import OnnxModel, checked

    try:
        built = build(module, architecture, precision=settings.precision, example=settings.example, part=settings.part)
    except ModelError as error:
        raise CheckpointError(f"export to onnx: {error}") from error
    size = built.model.ByteSize()
    if not 0 < size < LARGEST_FILE:
        raise CheckpointError(
            f"export to onnx: the graph has {byte_count(size)}; one file holds at most {byte_count(LARGEST_FILE)}"
        )
    model = OnnxModel(built.model.SerializeToString())
    rounded = settings.precision == "fast" or bool(quantizers_of(module))
    difference, nmse = checked(model.outputs, built.checks, rounded=rounded, target=Onnx.name)
    set_metadata(built.model, {"difference": difference, "nmse_added": nmse})
    data: bytes = built.model.SerializeToString()
    return data


TARGETS.register(Onnx())

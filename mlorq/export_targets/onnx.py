"""Target ``onnx``: one file of standard operators that decode the packed codes when a runtime loads it.

The file has the checkpoint's size. Everything that a caller needs is in its metadata: names of inputs and outputs, the
preparation of images, onnxruntime's session options, and, for ``fast``, the NMSE that it adds.
"""

from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fsspec.core import url_to_fs
from pydantic import Field

from mlorq.artifacts.store import put_file
from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.export_targets.base import TARGETS, ExportTarget
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.base import Batch

OPSET = 21  # the first with 4-bit integers
LARGEST_FILE = 2**31 - 1  # bytes of a protobuf message
# Differences from the model, relative to the largest output, from which a graph does not compute the same function.
# Rounding of sums makes 1e-6 to 1e-5. Where values are rounded to codes, some fall on the other side.
WRONG, WRONG_IF_ROUNDED = 1e-4, 1.0


class OnnxConfig(Settings):
    """Options that a run's configuration may set."""

    precision: Literal["exact", "fast"] = Field(
        "exact", description="exact: the outputs of mlorq.load; fast: products by 8-bit integers"
    )
    opset: int = Field(OPSET, description="version of the operators")
    tokenizer: str | None = Field(
        None, description="folder, folder inside a package, or hub name of the tokenizer to write beside the file"
    )
    part: str = Field("", description="submodule to export; default: what the family can export")

    def check(self) -> None:
        """Check the opset.

        Raises:
            ValueError: it is not supported.
        """
        if self.opset != OPSET:
            raise ValueError(
                f"opset {self.opset} is not supported: leave it out, for {OPSET}, which has 4-bit integers"
            )


class OnnxSettings(OnnxConfig):
    """Options of the target."""

    model: Any = Field(None, description="Python only: instance of the float architecture, for user-defined modules")
    example: Any = Field(None, description="Python only: a batch of at least two samples to trace the model with")


class Onnx(ExportTarget[OnnxSettings]):
    """An ONNX graph."""

    name = "onnx"
    title = "graph for onnxruntime and other software (one .onnx file)"
    settings = OnnxSettings
    configured: ClassVar[type[Settings] | None] = OnnxConfig
    locations: ClassVar[tuple[str, ...]] = ("tokenizer",)
    suffixes = (".onnx",)
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    seconds: ClassVar[tuple[float, float]] = (16.0, 1.1e-7)  # measured: MiniLM and ViT-Base, 2 cores

    def write(self, checkpoint: str, output: str, settings: OnnxSettings) -> list[str]:
        from mlorq.checkpoint.io import inspect, load

        architecture = inspect(checkpoint)["architecture"]
        module = load(checkpoint, settings.model)
        files = {output: graph_bytes(module, architecture, settings)}
        source = _tokenizer(checkpoint, settings)
        if source is not None:
            folder = posixpath.dirname(output)
            files |= {posixpath.join(folder, name): data for name, data in source.items()}
        try:
            for location, data in files.items():
                fs, path = url_to_fs(location)
                fs.makedirs(posixpath.dirname(path) or ".", exist_ok=True)
                put_file(fs, path, data)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(f"{output} cannot be written: {error}") from error
        return list(files)

    def with_model(self, settings: OnnxSettings, model: nn.Module, example: Batch) -> OnnxSettings:
        return settings.model_copy(update={"model": model, "example": example})

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
    from mlorq.export_targets.onnx_graph.session import OnnxModel, compared

    try:
        built = build(module, architecture, precision=settings.precision, example=settings.example, part=settings.part)
    except ModelError as error:
        raise CheckpointError(f"export to onnx: {error}") from error
    size = built.model.ByteSize()
    if not 0 < size < LARGEST_FILE:
        raise CheckpointError(f"export to onnx: the graph has {size} bytes; one file holds at most {LARGEST_FILE}")
    model = OnnxModel(built.model.SerializeToString())
    try:
        measured = [compared(model.outputs(inputs), outputs) for inputs, outputs in built.checks]
    except ModelError as error:
        raise CheckpointError(f"export to onnx: the graph does not run on other numbers of samples: {error}") from error
    difference, nmse = max(one for one, _ in measured), measured[0][1]
    rounded = settings.precision == "fast" or bool(quantizers_of(module))
    if not difference <= (WRONG_IF_ROUNDED if rounded else WRONG):
        raise CheckpointError(
            f"export to onnx: the graph differs from the model by {difference:.1e} of the largest output: "
            "exporters do not see what depends on the values of inputs in Python; write it with torch.where"
        )
    set_metadata(built.model, {"difference": difference, "nmse_added": nmse})
    data: bytes = built.model.SerializeToString()
    return data


def _tokenizer(checkpoint: str, settings: OnnxSettings) -> dict[str, bytes] | None:
    """The files of the tokenizer that the settings name."""
    if settings.tokenizer is None:
        return None
    from mlorq.models.transformers import TransformersSettings, tokenizer

    try:
        found = tokenizer(TransformersSettings(name=settings.tokenizer, task="sentence-similarity"))
    except ModelError as error:
        raise ConfigError(f"export to onnx: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


TARGETS.register(Onnx())

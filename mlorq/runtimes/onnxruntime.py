"""Runtime ``onnxruntime``: the graph of target ``onnx``, from an exported file or made from a checkpoint at load.

A file loads in a second. Making the graph of a checkpoint takes as long as its export.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mlorq.codecs.base import Residency
from mlorq.errors import ConfigError
from mlorq.export_targets.onnx import Onnx, OnnxSettings, graph_bytes
from mlorq.registry import Settings
from mlorq.runtimes.base import RUNTIMES, Device, Runtime
from mlorq.runtimes.graph_residency import GraphPrecision, graph_residency

if TYPE_CHECKING:
    from torch import nn

    from mlorq.export_targets.onnx_graph.session import OnnxModel
    from mlorq.runtimes.benchmark import Variant


CODE_BITS = (4, 8)  # 4-bit kernels; 5 to 8 bits are two of their products


class OnnxRuntimeSettings(Settings):
    """Options of the runtime."""

    precision: Literal["exact", "fast"] | None = Field(
        None, description="exact (default), or fast: products by 8-bit integers; a file has its own"
    )
    example: Any = Field(None, description="a batch of at least two samples, for user-defined modules")
    threads: int | None = Field(None, ge=1, description="threads; default: as many as torch uses")


class OnnxRuntime(Runtime[OnnxRuntimeSettings]):
    """A session of onnxruntime on the CPU."""

    name = "onnxruntime"
    settings = OnnxRuntimeSettings
    packages: ClassVar[tuple[str, ...]] = Onnx.packages
    extra = Onnx.extra
    as_target: ClassVar[type[Settings] | None] = GraphPrecision
    integer_bits = 8

    def residency(self, settings: Settings) -> Residency:
        return graph_residency(settings, CODE_BITS)

    def load(self, location: str, model: nn.Module | None, device: Device, settings: OnnxRuntimeSettings) -> OnnxModel:
        from mlorq.export_targets.onnx_graph.session import OnnxModel

        if str(device) != "cpu":
            raise ConfigError(f"runtime {self.name} computes on the CPU: leave out device {device}")
        if location.lower().endswith(Onnx.suffixes):
            found = OnnxModel(location, settings.threads)
            if settings.precision not in (None, found.precision):
                raise ConfigError(
                    f"{location} was exported with precision {found.precision}: "
                    f"export it with --precision {settings.precision}"
                )
            return found
        from mlorq.checkpoint.io import inspect, load

        options = OnnxSettings(precision=settings.precision or "exact", example=settings.example)
        data = graph_bytes(load(location, model), inspect(location)["architecture"], options)
        return OnnxModel(data, settings.threads)

    def variants(self, checkpoint: str, folder: str) -> list[Variant]:
        from mlorq.checkpoint.io import inspect, load
        from mlorq.export_targets.onnx_graph.float_graph import float_twin
        from mlorq.export_targets.onnx_graph.session import options_here, read_metadata
        from mlorq.runtimes.benchmark import FLOAT, Variant

        architecture, module = inspect(checkpoint)["architecture"], load(checkpoint)
        graphs = {
            FLOAT: graph_bytes(float_twin(module, quantized=False)[0], architecture, OnnxSettings()),
            "exact": graph_bytes(module, architecture, OnnxSettings(precision="exact")),
            "fast": graph_bytes(module, architecture, OnnxSettings(precision="fast")),
        }
        found = []
        for name, data in graphs.items():
            path, about = os.path.join(folder, f"{name}.onnx"), read_metadata(data)
            Path(path).write_bytes(data)
            options = options_here(about["session_options"])
            added = None if name == FLOAT else about["nmse_added"]
            found.append(Variant(self.name, name, self.name, path, len(data), options, added))
        return found


RUNTIMES.register(OnnxRuntime())

"""Runtime ``openvino``: the model of target ``openvino``, from exported files or made from a checkpoint at load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mlorq.codecs.base import Residency
from mlorq.errors import ConfigError
from mlorq.export_targets.openvino import Openvino, OpenvinoSettings, openvino_model
from mlorq.registry import Settings
from mlorq.runtimes.base import RUNTIMES, Device, Runtime
from mlorq.runtimes.graph_residency import GraphPrecision, graph_residency

if TYPE_CHECKING:
    from torch import nn

    from mlorq.export_targets.openvino_graph.session import OpenvinoModel
    from mlorq.runtimes.benchmark import Variant


CODE_BITS = (2, 4, 8)  # of the constants that it keeps packed


class OpenvinoRuntimeSettings(Settings):
    """Options of the runtime."""

    precision: Literal["exact", "fast"] = Field(
        "exact", description="exact, or fast: decoded weights and inputs of products are rounded to 8 bits"
    )
    example: Any = Field(None, description="a batch of at least two samples, for user-defined modules")
    threads: int | None = Field(None, ge=1, description="threads; default: as many as torch uses")


class OpenvinoRuntime(Runtime[OpenvinoRuntimeSettings]):
    """OpenVINO on the CPU."""

    name = "openvino"
    settings = OpenvinoRuntimeSettings
    packages: ClassVar[tuple[str, ...]] = Openvino.packages
    extra = Openvino.extra
    as_target: ClassVar[type[Settings] | None] = GraphPrecision

    def residency(self, settings: Settings) -> Residency:
        return graph_residency(settings, CODE_BITS)

    def load(
        self, location: str, model: nn.Module | None, device: Device, settings: OpenvinoRuntimeSettings
    ) -> OpenvinoModel:
        from mlorq.export_targets.openvino_graph.session import OpenvinoModel

        if str(device) != "cpu":
            raise ConfigError(f"runtime {self.name} computes on the CPU: leave out device {device}")
        if location.lower().endswith(Openvino.suffixes):
            return OpenvinoModel(location, settings.precision, settings.threads)
        from mlorq.checkpoint.io import inspect, load

        options = OpenvinoSettings(example=settings.example)
        found = openvino_model(load(location, model), inspect(location)["architecture"], options)
        return OpenvinoModel(found, settings.precision, settings.threads)

    def variants(self, checkpoint: str, folder: str) -> list[Variant]:
        from mlorq.checkpoint.io import inspect, load
        from mlorq.export_targets.onnx_graph.float_graph import float_twin
        from mlorq.export_targets.openvino_graph.build import content
        from mlorq.export_targets.openvino_graph.session import read, read_metadata
        from mlorq.runtimes.benchmark import FLOAT, Variant

        architecture, module = inspect(checkpoint)["architecture"], load(checkpoint)
        modules = {FLOAT: float_twin(module, quantized=False)[0], "compressed": module}
        paths, sizes, added = {}, {}, {}
        for name, one in modules.items():
            graph, weights = content(openvino_model(one, architecture, OpenvinoSettings()))
            paths[name], sizes[name] = os.path.join(folder, f"{name}.xml"), len(graph) + len(weights)
            Path(paths[name]).write_bytes(graph)
            Path(folder, f"{name}.bin").write_bytes(weights)
            added[name] = read_metadata(read(paths[name]), name)["nmse_added"]

        def variant(title: str, name: str, precision: str) -> Variant:
            nmse = None if name == FLOAT else added[name][precision]
            return Variant(self.name, title, self.name, paths[name], sizes[name], {"precision": precision}, nmse)

        return [
            variant(FLOAT, FLOAT, "exact"),
            variant("exact", "compressed", "exact"),
            variant("fast", "compressed", "fast"),
        ]


def open_file(core: Any, path: str, precision: str, threads: int) -> Any:
    """The compiled model of an exported file, without torch.

    Args:
        core: ``openvino.Core``.
        path: of the ``.xml`` file.
        precision: ``exact`` or ``fast``.
        threads: threads of an operator.
    """
    from mlorq.export_targets.openvino_graph.decoding import compiled, release_memory

    found = compiled(core, core.read_model(path), precision, threads)
    release_memory()
    return found


RUNTIMES.register(OpenvinoRuntime())

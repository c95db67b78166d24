"""Target ``openvino``: OpenVINO's files (``.xml`` and ``.bin``) with the packed codes and operators that decode them.

One pair of files serves both precisions: ``mlorq.load(…, runtime="openvino", precision="fast")`` rounds at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.export_targets.base import TARGETS, ExportTarget
from mlorq.export_targets.graph_files import GraphConfig, write_beside
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

    from mlorq.models.batches import Batch

SUFFIX = ".xml"


class OpenvinoSettings(GraphConfig):
    """Options of the target."""

    model: Any = Field(None, description="Python only: instance of the float architecture, for user-defined modules")
    example: Any = Field(None, description="Python only: a batch of at least two samples to trace the model with")


class Openvino(ExportTarget[OpenvinoSettings]):
    """An OpenVINO model."""

    name = "openvino"
    title = "model for OpenVINO (an .xml and a .bin file)"
    settings = OpenvinoSettings
    configured: ClassVar[type[Settings] | None] = GraphConfig
    locations: ClassVar[tuple[str, ...]] = ("tokenizer",)
    suffixes = (SUFFIX,)
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra = "openvino"

    def write(self, checkpoint: str, output: str, settings: OpenvinoSettings) -> list[str]:
        from mlorq.checkpoint.io import inspect, load
        from mlorq.export_targets.openvino_graph.build import content
        from mlorq.export_targets.openvino_graph.session import weights_beside

        if not output.lower().endswith(SUFFIX):
            raise ConfigError(f"export to openvino: {output!r} does not end with {SUFFIX}: OpenVINO reads no other")
        architecture = inspect(checkpoint)["architecture"]
        graph, weights = content(openvino_model(load(checkpoint, settings.model), architecture, settings))
        files = {output: graph, weights_beside(output): weights}
        return write_beside(output, files, settings.tokenizer, self.name)

    def with_model(self, settings: OpenvinoSettings, model: nn.Module, example: Batch) -> OpenvinoSettings:
        return settings.model_copy(update={"model": model, "example": example})

    def summary(self, files: Sequence[str]) -> dict[str, Any]:
        """Bytes of both files, and the difference from the torch model on the example inputs."""
        from fsspec.core import url_to_fs

        from mlorq.export_targets.openvino_graph.session import read, read_metadata

        about = read_metadata(read(files[0]), files[0])
        sizes = [fs.size(path) for fs, path in (url_to_fs(file) for file in files[:2])]
        return {"bytes": sum(sizes), "difference": about["difference"], "nmse_added": about["nmse_added"]}


def openvino_model(module: nn.Module, architecture: Mapping[str, Any], settings: OpenvinoSettings) -> Any:
    """The ``openvino.Model`` of a compressed module, compared with the module on the example inputs.

    Args:
        module: the compressed module, on the CPU.
        architecture: its architecture, as in ``config.json``.
        settings: options of the target.

    Raises:
        CheckpointError: the model cannot be exported, or differs from the module.
    """
    from mlorq.activations.plan import quantizers_of
    from mlorq.export_targets.onnx_graph.session import checked
    from mlorq.export_targets.openvino_graph.build import build, set_metadata
    from mlorq.export_targets.openvino_graph.session import OpenvinoModel

    try:
        built = build(module, architecture, example=settings.example, part=settings.part)
    except ModelError as error:
        raise CheckpointError(f"export to openvino: {error}") from error
    differences, added = {}, {}
    for precision in ("exact", "fast"):
        rounded = precision == "fast" or bool(quantizers_of(module))
        model = OpenvinoModel(built.model, precision)
        differences[precision], added[precision] = checked(
            model.outputs, built.checks, rounded=rounded, target=Openvino.name
        )
    set_metadata(built.model, built.about | {"difference": differences["exact"], "nmse_added": added})
    return built.model


TARGETS.register(Openvino())

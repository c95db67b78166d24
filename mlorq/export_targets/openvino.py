"""Target ``openvino``: OpenVINO's files (``.xml`` and ``.bin``) with the packed codes and operators that decode them.

One pair of files serves both precisions: ``mlorq.load(…, runtime="openvino", precision="fast")`` rounds at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.export_targets.base import TARGETS
from mlorq.export_targets.graph_files import GraphConfig, GraphSettings, GraphTarget
from mlorq.registry import Settings

if TYPE_CHECKING:
    from torch import nn

SUFFIX = ".xml"


class OpenvinoSettings(GraphSettings):
    """Options of the target."""


class Openvino(GraphTarget[OpenvinoSettings]):
    """An OpenVINO model."""

    name = "openvino"
    title = "model for OpenVINO (an .xml and a .bin file)"
    settings = OpenvinoSettings
    configured: ClassVar[type[Settings] | None] = GraphConfig
    suffixes = (SUFFIX,)
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra = "openvino"

    def check_output(self, output: str) -> None:
        if not output.lower().endswith(SUFFIX):
            raise ConfigError(f"export to openvino: {output!r} does not end with {SUFFIX}: OpenVINO reads no other")

    def contents(
        self, output: str, module: nn.Module, architecture: Mapping[str, Any], settings: OpenvinoSettings
    ) -> dict[str, bytes]:
        from mlorq.export_targets.openvino_graph.build import content
        from mlorq.export_targets.openvino_graph.session import weights_beside

        graph, weights = content(openvino_model(module, architecture, settings))
        return {output: graph, weights_beside(output): weights}

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

"""Exported models in OpenVINO: ``OpenvinoModel`` is called as the torch model is, and returns the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import fsspec
import numpy as np
import openvino
import torch
from torch import Tensor

from mlorq.errors import CheckpointError, ModelError, one_line
from mlorq.export_targets.onnx_graph.calls import Call, rebuilt
from mlorq.export_targets.openvino_graph.decoding import METADATA, compiled, release_memory


class OpenvinoModel:
    """A compressed model in OpenVINO, called as the torch model.

    Args:
        source: path or fsspec URL of an exported ``.xml`` file, or an ``openvino.Model``, which is not changed.
        precision: ``exact``, or ``fast``: decoded weights and inputs of products are rounded to 8 bits.
        threads: threads of one operator; None: as many as torch uses.

    Attributes:
        session: ``openvino.CompiledModel``.
        precision: ``exact`` or ``fast``.
        nmse_added: NMSE between the outputs of this model and of the torch model, on the example of the export.
        metadata: the JSON object in the file's metadata.

    Raises:
        CheckpointError: the file is missing, is not an exported model, or OpenVINO refuses it.
    """

    def __init__(self, source: Any, precision: str = "exact", threads: int | None = None) -> None:
        model = read(source) if isinstance(source, str) else source.clone()
        self.metadata = read_metadata(model, source if isinstance(source, str) else "the model")
        self.precision = precision
        self.nmse_added: float | None = self.metadata.get("nmse_added", {}).get(precision)
        self._call = Call.from_json(self.metadata["call"])
        threads = threads or torch.get_num_threads()
        try:
            self.session = compiled(openvino.Core(), model, precision, threads)
        except Exception as error:  # OpenVINO's exceptions have no common class
            raise CheckpointError(f"OpenVINO cannot compile the model: {one_line(error)}") from error
        del model
        release_memory()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the torch model, as it returns them; inputs may be tensors or NumPy arrays.

        Raises:
            ModelError: an input is missing or unknown.
        """
        values = self._call.tensors(args, kwargs)
        return rebuilt(self.outputs(values), self.metadata["outputs"])

    def outputs(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """All outputs of the graph by name, also those that the torch model does not have.

        Args:
            inputs: tensors or NumPy arrays by name.
        """
        arrays = {}
        for port in self.session.inputs:
            for name in port.names & inputs.keys():
                value = inputs[name]
                array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
                arrays[name] = np.ascontiguousarray(array, port.get_element_type().to_dtype())
        try:
            found = self.session(arrays)
        except Exception as error:  # OpenVINO's exceptions have no common class
            raise ModelError(f"OpenVINO: {one_line(error)}") from error
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(self.metadata["names"])}

    def eval(self) -> OpenvinoModel:
        """The model itself, which only computes in eval mode."""
        return self


def read(location: str) -> Any:
    """The ``openvino.Model`` of an exported file.

    Args:
        location: path or fsspec URL of the ``.xml`` file; the ``.bin`` file is beside it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    core = openvino.Core()
    try:
        with fsspec.open(location, "rb") as file:
            graph = file.read()
        if "://" not in location:
            return core.read_model(location)
        with fsspec.open(weights_beside(location), "rb") as file:
            return core.read_model(graph, file.read())
    except Exception as error:  # OpenVINO's exceptions have no common class
        raise CheckpointError(f"{location} cannot be read: {one_line(error)}") from error


def read_metadata(model: Any, name: str) -> dict[str, Any]:
    """The JSON object in the metadata of a model.

    Args:
        model: ``openvino.Model``.
        name: its name, for errors.

    Raises:
        CheckpointError: the model was not exported by this software.
    """
    if not model.has_rt_info(METADATA):
        raise CheckpointError(f"{name} is not a model that mlorq exported: export the checkpoint again")
    about: dict[str, Any] = json.loads(model.get_rt_info(METADATA).astype(str))
    return about


def weights_beside(location: str) -> str:
    """The location of the ``.bin`` file of an ``.xml`` file."""
    return location.removesuffix(".xml") + ".bin"

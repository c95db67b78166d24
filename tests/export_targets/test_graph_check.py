"""The comparison of a graph with its model: refused where they differ, and said where no comparison can decide."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mlorq.errors import CheckpointError

session = pytest.importorskip("mlorq.export_targets.onnx_graph.session", reason="needs the extra onnx")

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"y": 2 * inputs["x"]}


def fractional(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Jumps by one wherever 2²⁴ x changes by one: a change of the inputs' last digits moves all outputs."""
    return {"y": (inputs["x"].double() * 2**24).frac()}


def test_equal_graphs_pass() -> None:
    assert session.checked(double, [({"x": X}, double({"x": X}))], rounded=False, target="onnx") == (0.0, 0.0)


def test_a_graph_of_another_function_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"differs from the model by 5.0e-01 .* torch.where"):
        session.checked(double, [({"x": X}, {"y": 4 * X})], rounded=False, target="onnx")


def test_a_function_that_jumps_is_said_to_be_beyond_comparison() -> None:
    with pytest.raises(CheckpointError, match=r"so does the graph from itself .* pass other inputs as example="):
        session.checked(fractional, [({"x": X}, fractional({"x": X + 0.1}))], rounded=False, target="onnx")


def test_inputs_of_whole_numbers_are_not_moved() -> None:
    def graph(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert inputs["x"].dtype == torch.int64
        return {"y": inputs["x"].double()}

    with pytest.raises(CheckpointError, match=r"torch.where"):
        session.checked(graph, [({"x": torch.arange(4)}, {"y": torch.ones(4)})], rounded=False, target="onnx")

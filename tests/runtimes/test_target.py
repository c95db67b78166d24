"""The runtime that a model is meant for: what it holds of weights, its candidates, and budgets of its memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlorq
from mlorq.codecs.base import Residency, Storage
from mlorq.config.budget import Budget, parse_budget
from mlorq.config.run import RunConfig
from mlorq.costs.local import candidate_table
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms import FORMS, Candidate, Shape
from mlorq.forms.base import enumerate_candidates, held
from mlorq.forms.compressed_module import CompressedModule
from mlorq.runtimes import RUNTIMES
from tests.compressed import compressed, folder_of
from tests.layers import hessian_fit, search_config

EXACT, FAST = Residency((4, 8)), Residency((4, 8), 8)
SHAPE = Shape(96, 64)


def residency(runtime: str, **options: Any) -> Residency:
    found = RUNTIMES[runtime]
    assert found.as_target is not None
    return found.residency(found.as_target.model_validate(options))


# -- what a runtime holds -----------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Layers of different shapes, so that each is known by the shape of its operand."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [256, 288, 320, 352, 384, 416, 448, 480, 512]
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def operand_bytes(path: str) -> float:
    """Bytes of the right operands of all products of a graph, after its constants are folded."""
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    graph = model.graph
    shapes = {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in graph.value_info}
    shapes |= {one.name: list(one.dims) for one in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    bits = {one.name: onnx.TensorProto.DataType.Name(one.type.tensor_type.elem_type) for one in graph.value_info}
    width = {"UINT4": 4, "UINT8": 8, "INT8": 8, "FLOAT": 32}
    total = 0.0
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger"):
            continue
        if all(shapes.get(node.input[0], [0])):
            continue  # of two constants: factors that are multiplied out at load
        operand = node.input[1]
        maker = made_by.get(operand)
        codes = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else operand
        total += np.prod(shapes[codes]) * width[bits[codes]] / 8
    return total


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_it_holds_what_the_graph_multiplies_by(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    torch.manual_seed(0)
    net = Chain()
    module = compressed(net)
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    (file,) = mlorq.export(folder, tmp_path / "m.onnx", precision=precision, model=net, example=torch.randn(2, 256))
    meant = residency("onnxruntime", precision=precision)
    layers = [one for one in module.modules() if isinstance(one, CompressedModule)]
    assert {layer.candidate.form for layer in layers} == {"Q", "LR", "QLR", "TCQ"}
    expected = sum(held(layer.candidate, Shape(*layer.weight_shape), meant).bytes for layer in layers)
    # Scales and zero-points of rows are in the sum alone.
    assert 0.95 * expected < operand_bytes(str(file)) < expected


def test_widths_are_held_in_the_next_one_of_the_runtime() -> None:
    rows, columns = SHAPE.out_features, SHAPE.in_features
    for bits, wide in ((1, 4), (4, 4), (5, 8), (8, 8)):
        own = held(Candidate("Q", bits=bits), SHAPE, EXACT)
        assert own == (rows * columns * wide // 8 + 5 * rows, True)
    openvino = residency("openvino")
    assert held(Candidate("Q", bits=2), SHAPE, openvino).bytes == rows * columns // 4 + 5 * rows


def test_decoded_matrices_are_float32_or_8_bit() -> None:
    entries, coded = 96 * 64, Candidate("TCQ", bits=3)
    assert held(coded, SHAPE, EXACT) == (4 * entries, False)
    assert held(coded, SHAPE, FAST) == (entries + 4 * 96, True)
    assert held(coded, SHAPE, residency("torch", weights="dense")) == (4 * entries, True)
    packed = residency("torch", weights="packed")
    assert held(coded, SHAPE, packed) == (FORMS["TCQ"].size(coded, SHAPE, Storage()), True)
    factors = Candidate("LR", bits_a=4, bits_b=8, rank=60)  # above the break-even: multiplied out
    assert held(factors, SHAPE, EXACT) == (4 * entries, False)


# -- the search ---------------------------------------------------------------------------------------------------


def test_only_native_candidates_remain() -> None:
    settings = search_config(forms=["Q", "LR", "TCQ"]).form_settings

    def forms(residency: Residency | None) -> set[str]:
        found = enumerate_candidates(SHAPE, settings, Storage(residency=residency))
        return {candidate.form for candidate, _ in found}

    assert forms(None) >= {"Q", "TCQ"}
    assert "TCQ" not in forms(EXACT)
    assert "TCQ" in forms(FAST)
    assert forms(Residency()) == forms(None), "a convolution: all are decoded"
    # Codes of few bits take less memory than trellis codes, which are decoded: they are not superseded.
    few = [one for one, _ in enumerate_candidates(SHAPE, settings, Storage(residency=FAST)) if one.form == "Q"]
    assert {one.bits for one in few} == set(settings["Q"].model_dump()["bits"])


def test_the_front_has_memory_as_a_measure() -> None:
    torch.manual_seed(1)
    weight = torch.randn(96, 64)
    settings = search_config(forms=["Q", "LR", "TCQ"]).form_settings
    fit = hessian_fit(weight, torch.rand(96, 64) + 0.1)
    rows = candidate_table(fit, SHAPE, settings, Storage(residency=FAST)).to_pylist()
    points = np.array([[row["local_cost"], row["bytes"], row["memory"]] for row in rows])
    for row, own in zip(rows, points, strict=True):
        beaten = ((points <= own).all(1) & (points < own).any(1)).any()
        assert row["on_front"] == (not beaten) or FORMS[row["form"]].uniform
    assert candidate_table(fit, SHAPE, settings, Storage())["memory"].null_count > 0


# -- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "number", "memory"),
    [
        ("disk=25MB,memory=40MB", "bytes", 25_000_000, 40_000_000),
        ({"memory": "40kB", "disk": "3bit"}, "bits", 3, 40_000),
        ("memory=1.5MiB", "bits", 32, 3 * 2**19),
        ({"disk": "12.5%"}, "percent", 12.5, None),
    ],
)
def test_budgets_of_disk_and_memory(value: Any, kind: str, number: float, memory: int | None) -> None:
    found = parse_budget(value)
    assert (found.kind, found.value, found.memory) == (kind, number, memory)
    assert parse_budget(found.text) == found == Budget.from_json(json.loads(json.dumps(found.to_json())))


@pytest.mark.parametrize(
    "value",
    [
        "disk=",
        "ram=3MB",
        "disk=3bit,disk=4bit",
        "memory=3bit",
        "memory=0B",
        {"ram": "3MB"},
        {"memory": 40},
        {},
        "=3bit",
    ],
)
def test_budgets_that_are_none(value: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(value)
    assert "\n" not in str(caught.value)


def options(**changes: Any) -> dict[str, Any]:
    common = {"preset": "fast", "search": {"rotation": None, "bits": [2, 3, 4, 8]}, "target": "onnxruntime"}
    return common | changes


def batches() -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(4, 5, 16) for _ in range(2)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))


def test_both_budgets_hold(net: nn.Module, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    free = mlorq.compress(net, batches(), budget="5bit", store=store, **options())
    assert set(free.allocation["form"].to_pylist()) <= {"Q", "LR"}
    memory = free.metrics["memory"]
    rest = sum(4 * layer.bias.numel() for layer in net if isinstance(layer, nn.Linear))
    assert (memory["rest"], memory["budget_bytes"]) == (rest, None)
    meant = residency("onnxruntime")
    shapes = [Shape(32, 16), Shape(32, 32), Shape(16, 32)]
    rows = free.allocation.to_pylist()
    own = [held(Candidate.of_row(row), shape, meant).bytes for row, shape in zip(rows, shapes, strict=True)]
    assert memory["bytes"] == sum(own) + rest
    less = memory["bytes"] - 200
    bound = mlorq.compress(net, batches(), budget={"disk": "5bit", "memory": f"{less}B"}, store=store, **options())
    assert bound.metrics["memory"]["bytes"] <= less == bound.metrics["memory"]["budget_bytes"]
    assert bound.metrics["bytes"] <= free.metrics["budget_bytes"]
    assert bound.metrics["predicted_cost"] >= free.metrics["predicted_cost"]
    assert bound.metrics["steps"]["reused"] >= 7, "the search is that of the first call"


def test_memory_alone(net: nn.Module) -> None:
    found = mlorq.compress(
        net, batches(), budget="memory=2kB", **options(target={"runtime": "torch", "weights": "packed"})
    )
    assert found.metrics["memory"]["bytes"] <= 2000
    assert found.metrics["memory"]["target"] == "torch, weights packed"


def test_memory_needs_a_target(net: nn.Module) -> None:
    with pytest.raises(BudgetError, match="set target, for example target: onnxruntime"):
        mlorq.compress(net, batches(), budget="memory=2kB", **options(target=None))


def test_too_little_memory_is_named(net: nn.Module) -> None:
    with pytest.raises(BudgetError, match="take 320 B of memory; ask for more than that"):
        mlorq.compress(net, batches(), budget="memory=300B", **options())
    with pytest.raises(BudgetError, match="the smallest possible is"):
        mlorq.compress(net, batches(), budget="memory=400B", **options())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tvm", "target.runtime"),
        ({"runtime": "torch", "precision": "fast"}, "target torch has no option 'precision'; known: weights"),
        ({"runtime": "openvino", "precision": "half"}, "target.precision"),
    ],
)
def test_wrong_targets(target: Any, message: str, net: nn.Module) -> None:
    with pytest.raises(ConfigError, match=message):
        mlorq.compress(net, batches(), **options(target=target))


@pytest.mark.parametrize(
    ("runtime", "activations", "code_bits"),
    [
        ("onnxruntime", None, (4, 8)),
        ("onnxruntime", {"bits": 8}, (8,)),
        ("onnxruntime", {"bits": 8, "ranges": "token"}, (4, 8)),
        ("openvino", {"bits": 8}, (2, 4, 8)),
        ({"runtime": "torch", "weights": "packed"}, {"bits": 8}, ()),
    ],
)
def test_codes_of_integer_products_are_held_in_8_bits(runtime: Any, activations: Any, code_bits: tuple[int]) -> None:
    given = {"family": "custom", "factory": "x:y"}
    data = {"calibration": {"source": "custom", "factory": "x:y"}, "evaluation": {"source": "custom", "factory": "x:y"}}
    values = {"model": given, "data": data, "budget": "4bit", "target": runtime, "activations": activations}
    found = RunConfig.from_mapping(values).residency
    assert found is not None
    assert found.code_bits == code_bits


def test_a_configuration_keeps_its_target(tmp_path: Path) -> None:
    values = {
        "model": {"family": "custom", "factory": "x:y"},
        "data": {
            "calibration": {"source": "custom", "factory": "x:y"},
            "evaluation": {"source": "custom", "factory": "x:y"},
        },
        "budget": [{"disk": "25MB", "memory": "40MB"}, "3bit"],
        "target": {"runtime": "openvino", "precision": "fast"},
    }
    config = RunConfig.from_mapping(values)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = RunConfig.from_yaml(path)
    assert again.target == config.target
    assert again.budget == ["disk=25MB,memory=40MB", "3bit"]
    assert again.residency == Residency((2, 4, 8), 8)

"""Products of static 8-bit activations and affine codes: onnxruntime multiplies integers, with the values of torch.

Outputs of layers are compared in units of the next quantizer: the torch model continues from onnxruntime's codes after
every quantizer, so that at the next one only what lies between the two can differ.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.activations.products import attach_input
from mlorq.activations.quantizers import UniformQuantizer
from mlorq.codecs.affine import QuantizedMatrix
from mlorq.codecs.trellis import TrellisMatrix
from mlorq.forms.base import Candidate
from mlorq.forms.modules import CompressedLinear, replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from tests import zoo
from tests.compressed import affine, trellis
from tests.export_targets.graph_cases import call, nmse, text_architecture, text_batch
from tests.export_targets.models import first_output
from tests.long import few

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
sessions = pytest.importorskip("mlorq.export_targets.onnx_graph.session", reason="needs the extra onnx")

PRECISE = sessions.PRECISE

INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm")
FLOAT = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits")


class Session:
    """A graph in onnxruntime with all optimisations.

    Attributes:
        graph: what onnxruntime made of it.
        counts: numbers of its operators.
    """

    def __init__(self, model: Any, folder: Path, options: dict[str, str]) -> None:
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.optimized_model_filepath = str(folder / "optimised.onnx")
        for key, value in options.items():
            settings.add_session_config_entry(key, value)
        self._session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        self.graph = onnx.load(settings.optimized_model_filepath).graph
        self.counts = Counter(node.op_type for node in self.graph.node)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    def products(self, kinds: tuple[str, ...]) -> int:
        return sum(self.counts[kind] for kind in kinds)


def options_of(model: Any) -> dict[str, str]:
    from mlorq.export_targets.onnx_graph.build import metadata

    found: dict[str, str] = metadata(model)["session_options"]
    return found


MODELS = {"vit": ("normalized", "timm"), "bert": ("uniform", "transformers")}
CASES = [(kind, bits) for kind in MODELS for bits in (8, 4)]


def quantized(kind: str, bits: int) -> tuple[nn.Module, dict[str, Any], Any]:
    """A small model with weights of ``bits`` and static activations of 8 bits, and other inputs than it has seen."""
    if kind == "vit":
        module: nn.Module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)
        architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
        batches, other = [zoo.pixels(4, seed) for seed in range(2)], zoo.pixels(6, 9)
    else:
        module = zoo.text_model("bert")
        architecture = text_architecture(module, "sentence-similarity")
        batches, other = [text_batch(4, 23, seed=seed) for seed in range(2)], text_batch(5, 19, seed=9)
    result = mlorq.compress(
        module,
        batches,
        budget="100%",
        forward=first_output,
        preset="integer",
        rounding="nearest",
        activations={"bits": 8, "method": MODELS[kind][0]},
        search={**zoo.QUICK, "forms": ["Q"], "bits": [bits]},
    )
    return result.model, architecture, other


@pytest.mark.parametrize("case", few(CASES, ("vit", 8), ("bert", 4)))
def test_models(case: tuple[str, int], tmp_path: Path) -> None:
    """All linear layers are integer products, and no code differs from torch's by more than one."""
    from mlorq.export_targets.onnx_graph.build import build
    from mlorq.export_targets.onnx_graph.session import options_here

    kind, bits = case
    module, architecture, batch = quantized(kind, bits)
    inputs = batch if isinstance(batch, dict) else {"x": batch}
    model = build(module, architecture).model
    options = options_here(options_of(model))
    plain = Session(model, tmp_path, options)
    layers = sum(isinstance(child, CompressedLinear) for child in module.modules())
    # With one range for the probabilities of attention, too, both of its products are of integers, else the first one.
    blocks, of_attention = 2, 2 if kind == "bert" else 1
    assert plain.products(INTEGER) == layers + of_attention * blocks
    assert plain.products(FLOAT) == (2 - of_attention) * blocks
    expected = call(module, batch)
    found = plain(inputs)
    expected = {"output": expected} if isinstance(expected, Tensor) else dict(expected)
    assert max(nmse(found[name], value) for name, value in expected.items()) < 1e-3

    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(node.output[0]) for node in pairs)
    session = Session(model, tmp_path, options)
    assert session.products(INTEGER) == plain.products(INTEGER)
    values = session(inputs)
    # By scale: the exporter writes equal quantizers of one tensor once. Those by channel have scale 1, in order.
    scales = {
        tensor.name: onnx.numpy_helper.to_array(tensor).item() for tensor in model.graph.initializer if not tensor.dims
    }
    seen = {scales[node.input[1]]: values[node.output[0]].float() for node in pairs}
    by_channel = [values[node.output[0]].float() for node in pairs if scales[node.input[1]] == 1]
    assert len(pairs) == len(seen) + max(len(by_channel) - 1, 0)
    differences: dict[float | int, Tensor] = {}

    def continued(quantizer: UniformQuantizer, args: tuple[Tensor], _: Tensor) -> Tensor:
        """Compare codes, and go on with those of onnxruntime."""
        if quantizer.scale.numel() > 1:
            key, theirs = -len(by_channel), by_channel.pop(0)
        else:
            key = quantizer.scale.item()
            theirs = seen[key]
        own = (args[0] / quantizer.scale + quantizer.zero).round().clamp(0, quantizer.levels)
        assert theirs.shape == own.shape
        differences[key] = (theirs - own).abs()
        return (theirs - quantizer.zero) * quantizer.scale

    for child in module.modules():
        if isinstance(child, UniformQuantizer):
            child.register_forward_hook(continued)
    call(module, batch)
    assert len(differences) == len(pairs)
    assert max(float(one.max()) for one in differences.values()) <= 1
    # Codes that differ at all are those of values halfway between two.
    assert max(float(one.mean()) for one in differences.values()) < 1e-2


class Single(nn.Module):
    """A linear layer with codes of its weight and of its input."""

    def __init__(self, matrix: QuantizedMatrix | TrellisMatrix, zero: float, *, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias)
        form = "Q" if isinstance(matrix, QuantizedMatrix) else "TCQ"
        record = CompressedLayer("layer", Candidate(form, bits=matrix.bits), {"weight": matrix})
        replace_layers(self, {"layer": record})
        attach_input(self.layer, UniformQuantizer(8, torch.tensor(0.02), torch.tensor(zero)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def graph_of(module: Single, x: Tensor, folder: Path, **arguments: Any) -> tuple[Session, dict[str, str]]:
    """The graph in onnxruntime, and the options that it asks for."""
    from mlorq.export_targets.onnx_graph.build import build

    model = build(module.eval(), {"family": "custom"}, example=x, **arguments).model
    return Session(model, folder, options_of(model)), options_of(model)


@pytest.mark.parametrize(
    ("matrix", "zero", "bias", "dims"),
    [
        (affine(12, 10, 8, 0), 128.0, True, 2),
        (affine(7, 13, 4, 1), 3.25, False, 2),
        (affine(5, 3, 2, 2), -30.5, True, 3),
        (affine(9, 31, 7, 3), 300.75, False, 3),
        (affine(12, 10, 5, 4, wide=True), 0.0, False, 3),
    ],
)
def test_layers_of_any_shape(matrix: QuantizedMatrix, zero: float, bias: bool, dims: int, tmp_path: Path) -> None:
    """Odd shapes, with and without a bias, zero-points that are no codes: one integer product, with float rounding."""
    torch.manual_seed(0)
    module = Single(matrix, zero, bias=bias)
    # Within the range of the codes and beyond it, never halfway between two.
    shape = (4, 6, matrix.shape[1])[3 - dims :]
    x = (torch.randint(-9, 265, shape) + 0.8 * torch.rand(shape) - 0.4 - zero) * 0.02
    session, options = graph_of(module, x, tmp_path)
    assert session.products(INTEGER) == 1
    assert session.products(FLOAT) == 0
    assert (PRECISE in options) == (matrix.bits >= 7), "codes that overflow sums of 16 bits"
    (found,) = session({"x": x}).values()
    expected = call(module, x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_fast_graphs_round_weights_only(tmp_path: Path) -> None:
    """Inputs that are integers are not rounded again, and the weights' 7 bits need no slower kernels."""
    module, x = Single(trellis(16, 64, 3, 0), 3.25, bias=True), torch.randn(4, 64)
    session, options = graph_of(module, x, tmp_path, precision="fast")
    assert session.counts["MatMulIntegerToFloat"] == 1
    assert session.counts["DynamicQuantizeLinear"] == 0
    assert PRECISE not in options
    (found,) = session({"x": x}).values()
    assert 0 < nmse(found, call(module, x)) < 1e-3


def test_without_integers_weights_are_decoded(tmp_path: Path) -> None:
    module, x = Single(affine(12, 10, 8, 0), 3.25, bias=True), torch.randn(4, 10)
    session, options = graph_of(module, x, tmp_path, integers=False)
    assert session.products(INTEGER) == 0
    assert PRECISE not in options
    (found,) = session({"x": x}).values()
    assert nmse(found, call(module, x)) < 1e-9


def test_loaded_graphs_are_exact_on_this_processor() -> None:
    """The largest sums of products: they saturate on processors without VNNI unless the session has the option."""
    from mlorq.export_targets.onnx_graph.build import build

    matrix = affine(8, 64, 8, 0)
    matrix.codes[:] = 255
    module, x = Single(matrix, 0.0, bias=False).eval(), torch.full((2, 64), 255 * 0.02)
    model = build(module, {"family": "custom"}, example=x).model
    found, expected = sessions.OnnxModel(model.SerializeToString())(x), call(module, x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_the_float_model_has_no_quantizers() -> None:
    from mlorq.export_targets.onnx_graph.float_graph import float_twin

    module, x = Single(affine(7, 13, 4, 1), 3.25, bias=True).eval(), torch.randn(4, 13)
    weight, bias = module.layer.weight, module.layer.bias
    found = call(float_twin(module, quantized=False)[0], x)
    assert torch.allclose(found, nn.functional.linear(x, weight, bias), rtol=1e-6, atol=1e-6)
    assert float((found - call(module, x)).abs().max()) > 1e-4


def test_the_option_for_exact_products_is_left_out_where_they_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {PRECISE: "1", "other": "2"}
    monkeypatch.setattr(sessions, "overflows", lambda: True)
    assert sessions.options_here(wanted) == wanted
    monkeypatch.setattr(sessions, "overflows", lambda: False)
    assert sessions.options_here(wanted) == {"other": "2"}

"""Compressed layers against F.linear and F.conv2d with dequantized weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.codecs.affine import QuantizedMatrix, ZeroPoint
from mlorq.errors import ModelError
from mlorq.forms.base import FORMS, Candidate
from mlorq.forms.convolutions import CompressedConv2d
from mlorq.forms.modules import CompressedLinear, replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from tests.layers import matrices_of, size_of

torch.set_num_threads(1)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = Candidate("Q", bits=3)
LOW_RANK = Candidate("LR", bits_a=6, bits_b=4, rank=5)
BOTH = Candidate("QLR", bits=3, bits_a=6, bits_b=4, rank=5)
CANDIDATES = (QUANTIZED, Candidate("Q", bits=8), LOW_RANK, Candidate("LR", bits_a=4, bits_b=8, rank=2), BOTH)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_compressed(
    name: str, layer: nn.Module, candidate: Candidate, seed: int, zero_point: ZeroPoint = "codes"
) -> CompressedLayer:
    """Random codes, scales and zero-points: unrelated to the layer's weight, so that using it shows."""
    weight, rng = layer.weight, generator(seed)
    assert isinstance(weight, Tensor)
    matrices = {}
    for part, (rows, columns, bits) in matrices_of(candidate, weight.shape[0], weight[0].numel()).items():
        codes = torch.randint(0, 2**bits, (rows, columns), generator=rng, dtype=torch.uint8)
        scale = (torch.rand(rows, generator=rng) * 0.1 + 0.01).to(torch.float16)
        if zero_point == "codes":
            zero = torch.randint(0, 2**bits, (rows,), generator=rng, dtype=torch.uint8)
        else:
            zero = torch.randint(-300, 300, (rows,), generator=rng, dtype=torch.int16)
        matrices[part] = QuantizedMatrix(codes, scale, zero, bits)
    return CompressedLayer(name, candidate, matrices)


def random_linear(seed: int, inputs: int = 19, outputs: int = 13, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def random_conv(seed: int, inputs: int = 6, outputs: int = 8, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(inputs, outputs, kernel, **options).requires_grad_(False)


def parts(compressed: CompressedLayer, dtype: torch.dtype) -> list[Tensor]:
    return [matrix.dequantize().to(dtype) for matrix in compressed.matrices.values()]


# -- linear -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", ["codes", "int16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.candidate_id)
def test_linear_is_exact(candidate: Candidate, dtype: torch.dtype, bias: bool, zero_point: ZeroPoint) -> None:
    layer = random_linear(1, bias=bias).to(dtype)
    compressed = random_compressed("fc", layer, candidate, 2, zero_point)
    module = CompressedLinear.from_layer(layer, compressed)
    inputs = torch.randn(4, 7, 19, generator=generator(3)).to(dtype)
    if candidate.form == "Q":
        expected = F.linear(inputs, parts(compressed, dtype)[0], layer.bias)
    else:
        *weight, a, b = parts(compressed, dtype)
        expected = F.linear(F.linear(inputs, b), a, layer.bias)
        expected = expected + F.linear(inputs, weight[0]) if weight else expected
    for _ in range(2):  # computed, then kept
        outputs = module(inputs)
        assert outputs.dtype == dtype
        assert torch.equal(outputs, expected)
    dense = F.linear(inputs.float(), compressed.dense(), layer.bias.float() if bias else None)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (outputs.float() - dense).norm() <= tolerance * dense.norm()


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.candidate_id)
@pytest.mark.parametrize("zero_point", ["codes", "int16"])
def test_buffers_hold_the_exact_bytes_and_give_the_record_back(candidate: Candidate, zero_point: ZeroPoint) -> None:
    layer = random_linear(4)
    compressed = random_compressed("fc", layer, candidate, 5, zero_point)
    module = CompressedLinear.from_layer(layer, compressed)
    assert module.stored_bytes == size_of(candidate, 13, 19, zero_point=zero_point)
    names = set(FORMS[candidate.form].names)
    suffixes = ("codes", "scale", "zero_point")
    assert set(module.state_dict()) == {f"{name}_{part}" for name in names for part in suffixes} | {"bias"}
    back = module.compressed_layer()
    assert (back.layer, back.candidate) == ("fc", candidate)
    for name, tensor in compressed.tensors().items():
        assert back.tensors()[name].dtype == tensor.dtype
        assert torch.equal(back.tensors()[name], tensor)


def test_low_rank_forward_never_forms_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_linear(6, 40, 30)
    module = CompressedLinear.from_layer(layer, random_compressed("fc", layer, LOW_RANK, 7))
    monkeypatch.setattr(CompressedLayer, "dense", lambda self: pytest.fail("dense weight formed"))
    shapes = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.append(tuple(w.shape)) or original(x, w, b))
    module(torch.randn(3, 40, generator=generator(8)))
    assert shapes == [(5, 40), (30, 5)]


@pytest.mark.parametrize("candidate", [QUANTIZED, LOW_RANK, BOTH])
def test_gradient_of_the_input(candidate: Candidate) -> None:
    layer = random_linear(9)
    compressed = random_compressed("fc", layer, candidate, 10)
    module = CompressedLinear.from_layer(layer, compressed)
    inputs = torch.randn(4, 19, generator=generator(11))
    with torch.inference_mode():
        module(inputs)  # what is kept here must serve the backward pass below
    inputs.requires_grad_()
    module(inputs).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, compressed.dense().sum(0).expand(4, -1))


def test_a_bias_of_the_record_takes_the_place_of_the_layers() -> None:
    layer = random_linear(14)
    compressed = replace(random_compressed("fc", layer, QUANTIZED, 15), bias=torch.arange(13.0))
    module = CompressedLinear.from_layer(layer, compressed)
    assert module.bias is not None
    assert torch.equal(module.bias, torch.arange(13.0))
    back = CompressedLayer.from_tensors("fc", QUANTIZED, compressed.tensors())
    assert back.bias is not None
    assert torch.equal(back.bias, torch.arange(13.0))
    with pytest.raises(ModelError, match="'fc' has no bias"):
        CompressedLinear.from_layer(random_linear(14, bias=False), compressed)


# -- convolution --------------------------------------------------------------------------------------------

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"kernel": 1, "bias": False},
    {"stride": 2, "padding": 1},
    {"kernel": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2},
    {"kernel": (2, 4), "padding": "same", "padding_mode": "circular"},
    {"padding": "valid", "padding_mode": "replicate"},
    {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    {"padding": 2, "padding_mode": "replicate", "dilation": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("candidate", [QUANTIZED, LOW_RANK, BOTH], ids=lambda candidate: candidate.candidate_id)
@pytest.mark.parametrize("batched", [True, False])
def test_convolution_matches_the_float_layer_with_its_weight(
    candidate: Candidate, geometry: dict[str, Any], batched: bool
) -> None:
    layer = random_conv(12, **geometry)
    compressed = random_compressed("conv", layer, candidate, 13)
    module = CompressedConv2d.from_layer(layer, compressed)
    inputs = torch.randn((2, 6, 9, 10) if batched else (6, 9, 10), generator=generator(14))
    outputs = module(inputs)
    with torch.no_grad():
        layer.weight.copy_(compressed.dense().view_as(layer.weight))
        expected = layer(inputs)
    if candidate.form == "Q":
        assert torch.equal(outputs, expected)
    else:
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.weight, layer.weight)


@pytest.mark.parametrize("groups", [2, 6])
def test_grouped_convolution_is_quantize_only(groups: int) -> None:
    layer = random_conv(15, 6, 12, 3, groups=groups, padding=1)
    compressed = random_compressed("conv", layer, QUANTIZED, 16)
    module = CompressedConv2d.from_layer(layer, compressed)
    inputs = torch.randn(2, 6, 7, 7, generator=generator(17))
    weight = compressed.dense().view_as(layer.weight)
    assert torch.equal(module(inputs), F.conv2d(inputs, weight, layer.bias, padding=1, groups=groups))
    with pytest.raises(ModelError, match=rf"'conv'.*{groups} groups has no low-rank form"):
        CompressedConv2d.from_layer(layer, random_compressed("conv", layer, LOW_RANK, 18))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_in_low_precision(dtype: torch.dtype) -> None:
    layer = random_conv(19).to(dtype)
    compressed = random_compressed("conv", layer, LOW_RANK, 20)
    inputs = torch.randn(2, 6, 9, 9, generator=generator(21)).to(dtype)
    a, b = parts(compressed, dtype)
    expected = F.conv2d(F.conv2d(inputs, b.view(5, 6, 3, 3)), a.view(8, 5, 1, 1), layer.bias)
    assert torch.equal(CompressedConv2d.from_layer(layer, compressed)(inputs), expected)


# -- cache, copies, casts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("candidate", [QUANTIZED, LOW_RANK])
def test_cache_is_only_a_matter_of_memory(candidate: Candidate) -> None:
    layer = random_linear(22)
    compressed = random_compressed("fc", layer, candidate, 23)
    kept = CompressedLinear.from_layer(layer, compressed)
    fresh = CompressedLinear.from_layer(layer, compressed, cache=False)
    inputs = torch.randn(3, 19, generator=generator(24))
    names = set(kept.state_dict())
    assert torch.equal(kept(inputs), fresh(inputs))
    part = "weight" if candidate.form == "Q" else "a"
    assert kept.dense(part) is kept.dense(part)
    assert fresh.dense(part) is not fresh.dense(part)
    assert set(kept.state_dict()) == names
    assert not fresh._kept
    before = kept.dense(part)
    kept.to("cpu")
    assert kept.dense(part) is not before
    before = kept.dense(part)
    kept.drop_cache()
    assert kept.dense(part) is not before


@pytest.mark.parametrize("candidate", [QUANTIZED, LOW_RANK])
def test_deepcopy_after_use(candidate: Candidate) -> None:
    layer = random_linear(25)
    module = CompressedLinear.from_layer(layer, random_compressed("fc", layer, candidate, 26))
    inputs = torch.randn(3, 19, generator=generator(27))
    expected = module(inputs)
    copy = deepcopy(module)
    assert not copy._kept
    assert module._kept
    assert torch.equal(copy(inputs), expected)
    for name, tensor in copy.state_dict().items():
        assert tensor.data_ptr() != module.state_dict()[name].data_ptr()


def test_state_dict_round_trip_replaces_what_is_kept() -> None:
    layer = random_linear(28)
    source = CompressedLinear.from_layer(layer, random_compressed("fc", layer, LOW_RANK, 29))
    target = CompressedLinear.placeholder(random_linear(30), "fc", LOW_RANK, "codes")
    inputs = torch.randn(3, 19, generator=generator(31))
    assert not torch.equal(target(inputs), source(inputs))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(inputs), source(inputs))


def test_state_dict_of_another_dtype_is_refused() -> None:
    layer = random_linear(32)
    source = CompressedLinear.from_layer(layer, random_compressed("fc", layer, QUANTIZED, 33, "int16"))
    target = CompressedLinear.placeholder(layer, "fc", QUANTIZED, "codes")
    with pytest.raises(RuntimeError, match=r"weight_zero_point is torch\.int16 instead of torch\.uint8"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "type"])
@pytest.mark.parametrize("candidate", [QUANTIZED, LOW_RANK])
def test_casts_change_what_it_computes_in_and_not_what_it_stores(candidate: Candidate, cast: str) -> None:
    layer = random_linear(34)
    compressed = random_compressed("fc", layer, candidate, 35)
    module = CompressedLinear.from_layer(layer, compressed)
    model = nn.Sequential(module)
    stored = {name: tensor.clone() for name, tensor in module.stored_tensors().items()}
    if cast == "type":
        model.type(torch.float16)
    else:
        getattr(model, cast)()
    dtype = torch.bfloat16 if cast == "bfloat16" else torch.float16
    for name, tensor in module.stored_tensors().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name])
    inputs = torch.randn(3, 19, generator=generator(36)).to(dtype)
    expected = CompressedLinear.from_layer(layer.to(dtype), compressed)(inputs)
    assert torch.equal(model(inputs), expected)
    model.float()
    assert module(inputs.float()).dtype == torch.float32
    part = next(iter(compressed.matrices))
    assert torch.equal(module.dense(part), parts(compressed, torch.float32)[0])


def test_export_holds_the_codes_and_leaves_no_tracing_tensor_behind() -> None:
    layer = random_linear(37)
    model = nn.Sequential(CompressedLinear.from_layer(layer, random_compressed("fc", layer, QUANTIZED, 38)))
    inputs = torch.randn(3, 19, generator=generator(39))
    model(inputs)  # what is kept now must not become a constant of the program
    program = torch.export.export(model.eval(), (inputs,))
    assert not any(tensor.numel() == 13 * 19 for tensor in program.constants.values())
    assert type(model[0].dense("weight")) is Tensor
    assert torch.equal(program.module()(inputs), model(inputs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.candidate_id)
def test_on_a_gpu(candidate: Candidate) -> None:
    layer = random_linear(40)
    compressed = random_compressed("fc", layer, candidate, 41)
    module = CompressedLinear.from_layer(layer, compressed)
    inputs = torch.randn(3, 19, generator=generator(42))
    expected = module(inputs)
    torch.testing.assert_close(module.cuda()(inputs.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    part = next(iter(compressed.matrices))
    assert torch.equal(module.dense(part).cpu(), parts(compressed, torch.float32)[0])


# -- in a model ---------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One module under two names, one weight in two modules, one bias in two modules, one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.first.weight
        self.other = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.norm.bias = self.other.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.other(self.twin(self.again(self.first(inputs)))))


def test_shared_layers_are_replaced_everywhere() -> None:
    torch.manual_seed(43)
    model = Shared().eval()
    first = random_compressed("first", model.first, QUANTIZED, 44)
    other = random_compressed("other", model.other, LOW_RANK, 45)
    copy = deepcopy(model)
    replace_layers(copy, {"first": first, "other": other})
    assert copy.again is copy.first
    assert isinstance(copy.twin, CompressedLinear)
    assert copy.twin.weight_codes is copy.first.weight_codes
    assert {copy.first.layer_name, copy.twin.layer_name} == {"first"}
    assert model.first.bias.requires_grad
    assert not any(layer.bias.requires_grad for layer in (copy.first, copy.twin, copy.other))
    assert torch.equal(copy.twin.bias, model.twin.bias)
    assert copy.norm.bias is copy.other.bias
    # The copied-from model is untouched, and serves as the oracle with dense weights.
    assert type(model.first) is nn.Linear
    inputs = torch.randn(5, 8, generator=generator(46))
    with torch.no_grad():
        model.first.weight.copy_(first.dense())
        model.other.weight.copy_(other.dense())
        torch.testing.assert_close(copy(inputs), model(inputs))


def test_aliases_name_what_no_longer_shares() -> None:
    model = deepcopy(Shared())
    model.twin.weight = nn.Parameter(model.twin.weight.detach().clone())
    compressed = random_compressed("first", model.first, QUANTIZED, 47)
    unaware, aware = deepcopy(model), deepcopy(model)
    replace_layers(unaware, {"first": compressed})
    assert type(unaware.twin) is nn.Linear
    replace_layers(aware, {"first": compressed}, {"first": ["again", "twin"]})
    assert aware.twin.weight_codes is aware.first.weight_codes


def test_modules_that_read_the_weight_themselves() -> None:
    """PyTorch's attention and encoder layers never call their linear layers in the fast path."""
    torch.manual_seed(48)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    names = ("self_attn.out_proj", "linear1", "linear2")
    layers = {
        name: random_compressed(name, model.get_submodule(name), Candidate("Q", bits=4), 49 + index)
        for index, name in enumerate(names)
    }
    # Its output projection is a subclass of nn.Linear that does the same.
    copy = deepcopy(model)
    replace_layers(copy, layers)
    for name, compressed in layers.items():
        model.get_submodule(name).weight.copy_(compressed.dense())
    inputs = torch.randn(2, 5, 16, generator=generator(50))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(copy(inputs), model(inputs))


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(random_linear(51)).eval()
    replace_layers(model, {"0": random_compressed("0", model[0], QUANTIZED, 52)})
    assert not model[0].training


def test_the_representation_names_form_bits_and_rank() -> None:
    layer, conv = random_linear(53), random_conv(54, groups=2, padding=1)
    assert repr(CompressedLinear.from_layer(layer, random_compressed("fc", layer, LOW_RANK, 55))) == (
        "CompressedLinear(in_features=19, out_features=13, form=LR, rank=5, bits_a=6, bits_b=4, bias=True)"
    )
    shown = repr(CompressedConv2d.from_layer(conv, random_compressed("conv", conv, QUANTIZED, 56)))
    assert shown.startswith("CompressedConv2d(6, 8, kernel_size=(3, 3)")
    assert "groups=2, form=Q, bits=3" in shown


# -- errors -------------------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_that_cannot_be_replaced_are_named() -> None:
    model = nn.Sequential(OwnForward(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    compressed = random_compressed("2", model[2], QUANTIZED, 57)
    with pytest.raises(ModelError, match=r"'0'.*OwnForward has a forward of its own"):
        replace_layers(model, {"0": replace(compressed, layer="0")})
    with pytest.raises(ModelError, match="'1' is a LayerNorm"):
        replace_layers(model, {"1": compressed})
    with pytest.raises(ModelError, match="no layer '7'"):
        replace_layers(model, {"7": compressed})
    with pytest.raises(ModelError, match="one single layer"):
        replace_layers(model[2], {"": compressed})
    with pytest.raises(ModelError, match=r"'2'.*it is a Linear"):
        CompressedConv2d.from_layer(model[2], compressed)


def test_matrices_that_do_not_fit_are_named() -> None:
    layer = random_linear(58)
    good = random_compressed("fc", layer, QUANTIZED, 59)
    other = random_compressed("fc", random_linear(60, 20, 13), QUANTIZED, 61)
    with pytest.raises(ModelError, match=r"'fc'.*\(13, 20\).*instead of.*\(13, 19\)"):
        CompressedLinear.from_layer(layer, other)
    with pytest.raises(ModelError, match="'fc'"):
        CompressedLinear.from_layer(layer, replace(good, candidate=LOW_RANK))
    with pytest.raises(ModelError, match="'fc'"):
        CompressedLinear.from_layer(layer, replace(good, candidate=Candidate("Q", bits=4)))
    matrix = good.matrices["weight"]
    wrong_scale = replace(matrix, scale=matrix.scale.double())
    with pytest.raises(ModelError, match=r"'fc': scale of weight is torch\.float64 instead of torch\.float16"):
        CompressedLinear.from_layer(layer, replace(good, matrices={"weight": wrong_scale}))
    too_large = replace(matrix, codes=torch.full_like(matrix.codes, 8))
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        CompressedLinear.from_layer(layer, replace(good, matrices={"weight": too_large}))

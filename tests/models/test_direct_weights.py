"""Weights that a model reads without calling their layer are compressed like those of other layers."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import mlorq
from mlorq.checkpoint.io import dense_state, inspect, load
from mlorq.errors import CheckpointError
from mlorq.models import from_module
from mlorq.models.arrangement import Arrangement
from mlorq.models.attention import ProjectedAttention, split
from mlorq.models.direct import WeightView, weight_of
from mlorq.models.direct_weights import arrange, arrangement_of
from mlorq.models.layers import find_layers

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}
VISION = {
    "beit_base_patch16_224": {"img_size": 32},
    "swinv2_tiny_window8_256": {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_heads": (1, 1)},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 32},
}


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vision(name: str) -> tuple[nn.Module, Tensor]:
    import timm

    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "num_classes": 3, "depth": 1, "num_heads": 2} | VISION[name]
    if "depths" in arguments:
        del arguments["depth"]
    module = timm.create_model(name, pretrained=False, **arguments).eval()
    for key, value in module.named_parameters():  # biases that are zero would hide a lost one
        if key.endswith("_bias"):
            value.data.normal_()
    return module, random(4, 3, arguments["img_size"], arguments["img_size"])


class Own(nn.Module):
    """Multiplies with parameters of its own in several ways, and with the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12))
        self.p, self.q = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6, 6))
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.linear(x, self.w, self.b) @ self.p)
        x = torch.matmul(x, self.q.t()) + self.q.shape[0] + self.shift.sum()
        return self.head(F.linear(x, weight=self.layer.weight.to(x.dtype), bias=self.layer.bias))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)
        for name, value in self.named_parameters():
            if name.endswith("bias"):
                value.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def outputs(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


BUILD: dict[str, Any] = {
    "own": lambda: (Own().eval(), random(8, 8)),
    "encoder": lambda: (Encoder().eval(), random(8, 5, 8)),
    **{name: (lambda name=name: vision(name)) for name in VISION},
}
READ = {
    "own": ["layer", "p", "q", "w"],
    "encoder": [
        f"encoder.layers.{i}.self_attn.{one}" for i in range(2) for one in ("q_proj", "k_proj", "v_proj", "out_proj")
    ],
    "swinv2_tiny_window8_256": ["layers.0.blocks.0.attn.qkv", "layers.1.blocks.0.attn.qkv"],
}


SOME = ("own", "encoder", "beit_base_patch16_224")


@pytest.fixture(
    scope="module",
    params=[*SOME, *(pytest.param(kind, marks=pytest.mark.long) for kind in sorted({*BUILD} - {*SOME}))],
)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, str]:
    module, x = BUILD[request.param]()
    result = mlorq.compress(module, [x[: len(x) // 2], x[len(x) // 2 :]], budget="8bit", device="cpu", **QUICK)
    folder = str(tmp_path_factory.mktemp("direct"))
    result.save(folder)
    return request.param, result, folder


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_the_function_is_kept(kind):
    module, x = BUILD[kind]()
    wanted = outputs(module, x)
    model = from_module(deepcopy(module))
    found = find_layers(model, x)
    assert {layer.name for layer in found.layers} >= set(READ.get(kind, ["blocks.0.attn.qkv"]))
    assert not [one for one in found.skipped if "read directly" in one.reason]
    assert torch.allclose(outputs(model.module, x), wanted, atol=1e-5)
    assert outputs(module, x).equal(wanted)  # the model that was copied
    arranged = arrangement_of(model.module)
    assert Arrangement.from_json(arranged.to_json()) == arranged
    arrange(model.module, arranged)  # again: nothing changes
    assert arrangement_of(model.module) == arranged


def test_the_weights_are_compressed(compressed):
    kind, result, _ = compressed
    layers = set(result.allocation["layer"].to_pylist())
    assert layers >= set(READ.get(kind, ["blocks.0.attn.qkv"]))
    assert not [one for one in result.left_float if "read directly" in one.reason]


def test_a_checkpoint_has_the_outputs_and_the_original_names(compressed):
    kind, result, folder = compressed
    module, x = BUILD[kind]()
    wanted = outputs(result.model, x)
    own = {} if kind in VISION else {"model": module}
    assert outputs(mlorq.load(folder, **own), x).equal(wanted)
    assert outputs(mlorq.load(folder, weights="packed", **own), x).equal(wanted)
    assert inspect(folder)["extra"]["arranged"]
    state, dropped = dense_state(folder)
    module.load_state_dict(state)
    assert not dropped
    assert torch.allclose(outputs(module, x), wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", pytest.param("encoder", marks=pytest.mark.long)])
def test_torch_traces_the_compressed_model(kind):
    module, x = BUILD[kind]()
    result = mlorq.compress(module, [x], budget="8bit", device="cpu", **QUICK)
    traced = torch.export.export(result.model, (x,)).module()
    assert torch.allclose(outputs(traced, x), outputs(result.model, x), atol=1e-5)


@pytest.mark.long
def test_a_fresh_process_loads_it(tmp_path):
    module, x = vision("beit_base_patch16_224")
    result = mlorq.compress(module, [x], budget="8bit", device="cpu", **QUICK)
    result.save(str(tmp_path))
    torch.save((x, outputs(result.model, x)), tmp_path / "outputs.pt")
    code = (
        "import sys, torch, mlorq\n"
        "x, wanted = torch.load(sys.argv[1] + '/outputs.pt')\n"
        "with torch.no_grad():\n    assert mlorq.load(sys.argv[1])(x).equal(wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in ("encoder", "beit_base_patch16_224")]


@pytest.mark.parametrize("kind", ["own", *LONG])
def test_onnx(kind, tmp_path):
    from mlorq.export_targets.onnx_graph.build import build
    from mlorq.export_targets.onnx_graph.session import OnnxModel
    from mlorq.models.custom import own_architecture

    module, x = BUILD[kind]()
    result = mlorq.compress(module, [x], budget="8bit", device="cpu", **QUICK)
    built = build(result.model, own_architecture(module), example=x)
    found = OnnxModel(built.model.SerializeToString())(x)
    assert torch.allclose(torch.as_tensor(found), outputs(result.model, x), atol=1e-4)
    size = built.model.ByteSize()
    assert size > 0
    weights = [one for one in built.model.graph.initializer if one.data_type == 1 and len(one.dims) == 2]
    assert all(one.dims[0] * one.dims[1] < 6 * 6 for one in weights)  # codes, no float weights


def test_activations_of_such_layers_are_quantized():
    module, x = Own().eval(), random(8, 8)
    result = mlorq.compress(module, [x], budget="8bit", activations={"bits": 4}, device="cpu", **QUICK)
    seen = []
    for name in ("w", "p", "layer"):
        quantizer = result.model.get_submodule(name).input_quantizer
        quantizer.register_forward_hook(lambda _, __, output, name=name: seen.append(name))
    outputs(result.model, x)
    assert seen == ["w", "p", "layer"]


# -- attention ------------------------------------------------------------------------------------------------


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).eval()
    for value in module.parameters():
        value.data.normal_()
    return module


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False, "add_zero_attn": True},
    {"batch_first": True, "add_bias_kv": True},
    {"kdim": 6, "vdim": 4, "add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_attention_is_that_of_torch(options, batched):
    module = attention(**options)
    mine = deepcopy(module)
    split(mine)
    n, targets, sources = 3, 4, 5
    order = (lambda x: x) if options.get("batch_first") or not batched else (lambda x: x.transpose(0, 1))
    shape = (n,) if batched else ()
    query = order(random(*shape, targets, 8))
    key = order(random(*shape, sources, module.kdim, seed=2))
    value = order(random(*shape, sources, module.vdim, seed=3))
    hidden = random(targets, sources, seed=4) > 1
    padding = torch.zeros(*shape, sources, dtype=torch.bool)
    padding[..., -1] = True
    whole = random((n if batched else 1) * 2, targets, sources, seed=5)
    masks: list[dict[str, Any]] = [{}, {"attn_mask": hidden}, {"attn_mask": whole}, {"key_padding_mask": padding}]
    masks += [{"attn_mask": hidden, "key_padding_mask": padding}]
    masks += [{"attn_mask": whole, "key_padding_mask": torch.where(padding, float("-inf"), 0.0)}]
    causal = torch.triu(torch.ones(targets, sources, dtype=torch.bool), 1)
    masks += [{"attn_mask": causal, "is_causal": True}]
    for mask, (need, average) in product(masks, [(True, True), (True, False), (False, True)]):
        given = {**mask, "need_weights": need, "average_attn_weights": average}
        with torch.no_grad():
            (wanted, weights), (found, own) = module(query, key, value, **given), mine(query, key, value, **given)
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-5), given
        assert (own is None) == (weights is None)
        assert weights is None or (own.shape == weights.shape and torch.allclose(own, weights, atol=1e-6))


def test_attention_refuses_what_torch_refuses():
    mine = attention(batch_first=True)
    split(mine)
    x = random(2, 4, 8)
    with pytest.raises(RuntimeError, match="pass attn_mask"):
        mine(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask has shape \(1, 4\)"):
        mine(x, x, x, attn_mask=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 1\)"):
        mine(x, x, x, key_padding_mask=torch.zeros(2, 1))


def test_fused_layers_of_torch_take_the_split_attention():
    module, x = Encoder().eval(), random(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    wanted = outputs(module.encoder, x)
    masked = module.encoder(x, src_key_padding_mask=padding)
    for layer in module.encoder.layers:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        split(layer.self_attn)
        assert isinstance(layer.self_attn, ProjectedAttention)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.allclose(outputs(module.encoder, x), wanted, atol=1e-5)
    found = module.encoder(x, src_key_padding_mask=padding)
    assert torch.allclose(found[~padding], masked[~padding], atol=1e-5)
    assert layer.self_attn.in_proj_weight.shape == (24, 8)


class Masked(nn.Module):
    """``nn.MultiheadAttention`` used alone, on a memory, with a mask of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = attention(batch_first=True, kdim=6, vdim=6), nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, memory, memory, key_padding_mask=~mask)[0].mean(1))


def test_attention_used_alone_with_masks(tmp_path):
    module = Masked().eval()
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[::2, 3] = False
    batch = (random(6, 5, 8), random(6, 4, 6, seed=2), mask)
    result = mlorq.compress(module, [batch], budget="8bit", device="cpu", **QUICK)
    names = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert set(result.allocation["layer"].to_pylist()) == names | {"head"}
    result.save(str(tmp_path / "checkpoint"))
    wanted = result.model(*batch)
    assert mlorq.load(str(tmp_path / "checkpoint"), model=module)(*batch).equal(wanted)
    mlorq.export(str(tmp_path / "checkpoint"), str(tmp_path / "dense.safetensors"))
    module.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.allclose(module(*batch), wanted, atol=1e-5)


# -- what stays as it is --------------------------------------------------------------------------------------


class Sliced(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.w[:6]) + F.linear(x, self.w.chunk(2)[1]))


class OtherBias(Own):
    """Leaves out the layer's own bias: a bias that rounding corrects would be lost."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x[:, :6], self.layer.weight))


class AsksForATensor(Own):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.w, Tensor)
        return self.head(F.linear(F.linear(x, self.w)[:, :6], self.layer.weight, self.layer.bias))


def test_other_uses_leave_the_weight_float_and_named():
    x = random(4, 8)
    for kind, name in ((Sliced, "w"), (OtherBias, "layer"), (AsksForATensor, "w")):
        module = kind().eval()
        wanted = outputs(module, x)
        found = find_layers(from_module(module), x)
        reasons = {one.name: one for one in (*found.skipped, *found.others)}
        assert reasons[name].bytes == (12 * 8 * 4 if name == "w" else 6 * 6 * 4)
        assert "read" in reasons[name].reason
        assert outputs(module, x).equal(wanted)
        if kind is AsksForATensor:  # the rest is arranged all the same
            assert {layer.name for layer in found.layers} == {"layer", "head"}


def test_everything_else_sees_the_dense_weight():
    module = Own().eval()
    value, layer = module.p.detach().clone(), module.layer.weight.detach().clone()
    find_layers(from_module(module), random(4, 8))
    assert isinstance(module.layer.weight, WeightView)
    assert weight_of(module.layer).equal(layer)
    assert module.p.shape == (12, 6)
    assert module.p.dtype is torch.float32
    assert (module.p * 2).equal(value * 2)
    assert module.p[3].equal(value[3])
    assert torch.cat([module.p, value]).equal(torch.cat([value, value]))
    assert (value.T @ module.p).shape == (6, 6)
    assert module.p.T.T.flipped
    assert module.p.to(torch.float64).dtype is torch.float64
    assert (module.layer.weight @ layer).equal(layer @ layer)
    assert not hasattr(module.p, "no_such_attribute")


def test_an_arrangement_that_does_not_fit_is_refused():
    for wanted, words in (
        (Arrangement(layers=("shift",)), "no module 'shift'"),
        (Arrangement(parameters=("b",)), "no matrix 'b'"),
        (Arrangement(attention=("layer",)), "not an nn.MultiheadAttention"),
    ):
        with pytest.raises(CheckpointError, match=words):
            arrange(Own(), wanted)
    with pytest.raises(ValueError, match="unknown keys"):
        Arrangement.from_json({"other": []})
    with pytest.raises(ValueError, match="lists of names"):
        Arrangement.from_json({"layers": "qkv"})


def test_half_precision_models_load(tmp_path):
    module, x = Own().eval().to(torch.bfloat16), random(8, 8).to(torch.bfloat16)
    result = mlorq.compress(module, [x], budget="8bit", device="cpu", **QUICK)
    result.save(str(tmp_path))
    assert load(str(tmp_path), model=module)(x).equal(result.model(x))
    assert "w" in result.allocation["layer"].to_pylist()

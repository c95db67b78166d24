"""What is compressed in the libraries' models and what stays float: fused attention, tables, norms, biases."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from flows.render import result_facts
from flows.render_checkpoint import print_checkpoint
from mlorq.checkpoint.float_sizes import KINDS, TensorSize, rest_by_kind
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, load, save
from mlorq.checkpoint.size_bound import float_rest
from mlorq.forms.base import Candidate
from mlorq.forms.modules import replace_layers
from mlorq.forms.trial import changed_by_replacement
from mlorq.models import from_module
from mlorq.models.layer_list import LayerList
from mlorq.models.layers import find_layers, weight_matrix
from tests import zoo
from tests.layers import hessian_fit, stored
from tests.nets import SharedNet, TokenNet, images


def texts() -> dict[str, torch.Tensor]:
    return dict(zoo.tokenizer()(zoo.SENTENCES, padding=True, return_tensors="pt"))


BUILD: dict[str, Any] = {
    "vit": lambda: (zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS), zoo.pixels(2, 1)),
    "swin": lambda: (zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS), zoo.pixels(2, 1)),
    "resnet": lambda: (zoo.timm_model("resnet10t", {"num_classes": 5}), zoo.pixels(2, 1, 64)),
    "bert": lambda: (zoo.text_model("bert-classifier"), texts()),
    "shared": lambda: (SharedNet(), torch.randn(3, 4, 6)),
    "unused": lambda: (TokenNet(), images(3, 1)),
}


def packed(kind: str, folder) -> tuple[nn.Module, Any, LayerList, dict[str, Any]]:
    """A model with every layer at 4 bits, saved."""
    module, batch = BUILD[kind]()
    model = from_module(module)
    found = find_layers(model, batch)
    layers = {}
    for layer in found.layers:
        weight = weight_matrix(module.get_submodule(layer.name))
        layers[layer.name] = stored(hessian_fit(weight), Candidate("Q", bits=4), layer.name)
    copy = deepcopy(module)
    replace_layers(copy, layers, {layer.name: list(layer.aliases) for layer in found.layers})
    save(checkpoint_files(copy, {"architecture": model.architecture}), folder)
    again = load(folder, model=module)
    assert torch.equal(model.outputs(again, batch), model.outputs(copy, batch))
    return module, batch, found, inspect(folder)


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_what_stays_float_is_counted_by_kind(kind, tmp_path):
    module, _, found, info = packed(kind, tmp_path)
    assert sum(info["rest"].values()) == info["sizes"]["rest_bytes"]
    assert list(info["rest"]) == list(KINDS)
    aliases = {layer.name: layer.aliases for layer in found.layers}
    assert rest_by_kind(float_rest(module, aliases)) == info["rest"], "known before, as it is on disk"
    norms = [child for child in module.modules() if "Norm" in type(child).__name__]
    expected = sum(tensor.nbytes for child in norms for tensor in child.state_dict().values())
    assert info["rest"]["norms"] == expected
    biases = sum(module.get_submodule(name).bias.nbytes for name in _biased(module, found))
    assert info["rest"]["biases"] == biases
    left = {
        "bert": {"embeddings": 4 * 32 * (24 + 2), "position_tables": 4 * 32 * 40},
        "vit": {"position_tables": 4 * 32 * 17, "other": 4 * 32},  # the class token
        "swin": {"position_tables": sum(v.nbytes for n, v in module.state_dict().items() if "relative" in n)},
        "unused": {"layers": 4 * 8 * 8},
    }.get(kind, {})
    assert {name: count for name, count in info["rest"].items() if name not in ("norms", "biases") and count} == left


def _biased(module: nn.Module, found: LayerList) -> list[str]:
    names = [name for layer in found.layers for name in (layer.name, *layer.aliases)]
    names += [one.name for one in found.skipped]
    unique = {id(module.get_submodule(name)): name for name in names}
    return [name for name in unique.values() if module.get_submodule(name).bias is not None]


def test_fused_attention_is_one_layer_and_separate_attention_three_that_share_their_input(tmp_path):
    _, _, fused, _ = packed("vit", tmp_path / "vit")
    qkv = fused["blocks.0.attn.qkv"]
    assert (qkv.out_features, qkv.in_features) == (96, 32)
    _, _, separate, _ = packed("bert", tmp_path / "bert")
    prefix = "bert.encoder.layer.1.attention.self"
    own = [separate[f"{prefix}.{name}"] for name in ("query", "key", "value")]
    assert [(layer.out_features, layer.in_features) for layer in own] == [(32, 32)] * 3
    assert len({layer.input_group for layer in own}) == 1
    assert len({layer.block for layer in own}) == 1
    others = [layer.input_group for layer in separate.layers if layer not in own]
    assert own[0].input_group not in others


def test_shared_weights_are_stored_once_and_unreached_layers_named(tmp_path):
    _, _, shared, info = packed("shared", tmp_path / "shared")
    assert [(layer.name, layer.aliases) for layer in shared.layers] == [("first", ("second",)), ("twice", ())]
    assert [row["layer"] for row in info["layers"]] == ["first", "twice"]
    assert info["sizes"]["bytes"] == 2 * 6 * (3 + 2 + 1)
    _, _, unused, _ = packed("unused", tmp_path / "unused")
    assert unused.skipped == [("unused", "never reached by a forward pass", 4 * 8 * 8)]


def test_people_are_told_what_stays_float(tmp_path, capsys):
    from rich.console import Console

    _, _, _, info = packed("bert", tmp_path)
    print_checkpoint(info, Console(width=300))
    out = capsys.readouterr().out
    assert "rest of the model" in out
    assert "position tables 5.12 kB, embeddings 3.33 kB" in out
    result = {"run": "r", "budget": "3bit", "budget_bytes": 9, "bytes": 8, "checkpoint": "x", "rest_bytes": 3328}
    result |= {"file_bytes": 9999, "predicted_cost": 0.1, "steps": {"computed": 1, "reused": 0}, "embedding_bytes": 77}
    result |= {"solver": {"name": "highs", "status": "optimal", "seconds": 0.1}, "rest": {"norms": 3328, "layers": 0}}
    facts = dict(result_facts(result))
    assert facts["rest of the model"].endswith(": norms 3.33 kB")
    assert facts["embedding tables"] == "77 B"


def test_kinds_are_told_by_names_and_shapes():
    sizes = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 5, 8),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "bn.running_mean": (8,),
        "bn.num_batches_tracked": (),
        "encoder.embed_tokens.weight": (30, 8),
        "patch_embed.proj.weight": (8, 3, 4, 4),  # a convolution that was left alone
        "patch_embed.proj.bias": (8,),
        "wpe.weight": (40, 8),
        "attn.in_proj_weight": (24, 8),
        "attn.in_proj_bias": (24,),
        "attn.input_quantizer.scale": (8,),
        "attn.product_quantizers.operands.0_left.zero": (),
    }
    found = rest_by_kind({name: TensorSize(shape, 1) for name, shape in sizes.items()})
    named = {"embeddings": 1, "position_tables": 2, "norms": 4, "biases": 2, "layers": 2}
    assert found == named | {"activation_quantizers": 2, "other": 1}


class TwoNames(nn.Module):
    """A layer that is called by two parts of the model, as the position encodings of CoaT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.first, self.second = nn.ModuleDict({"used": self.shared}), nn.ModuleDict({"used": self.shared})
        self.third = self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second["used"](torch.relu(self.first["used"](x))))


def test_a_layer_with_several_names_has_the_rows_of_its_samples() -> None:
    model, x = from_module(TwoNames()), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = find_layers(model, x)
    assert found.skipped == []
    assert {layer.name: len(layer.aliases) for layer in found.layers} == {"shared": 3, "head": 0}
    assert changed_by_replacement(model, found.layers, x) == {}


class Mapped(nn.Module):
    """Makes a mask by ``torch.vmap``, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * torch.vmap(lambda row: (row > 0).float())(x))


def test_a_model_may_use_vmap() -> None:
    found = find_layers(from_module(Mapped()), torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    assert [layer.name for layer in found.layers] == ["layer"]

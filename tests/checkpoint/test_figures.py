"""Bits per weight, multiply-accumulates and bit operations of checkpoints, against counts on running modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import mlorq
from flows.render_checkpoint import amount, print_checkpoint
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, save
from mlorq.errors import CheckpointError
from mlorq.forms.modules import replace_layers
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from tests import zoo
from tests.checkpoint.signing import edit
from tests.compressed import compressed, random_layer
from tests.nets import SharedNet, TokenNet, images


def texts() -> dict[str, Tensor]:
    return dict(zoo.tokenizer()(zoo.SENTENCES, padding=True, return_tensors="pt"))


BUILD: dict[str, Callable[[], tuple[nn.Module, Any, int]]] = {
    "vit": lambda: (zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS), zoo.pixels(3, 1), 3),
    "bert": lambda: (zoo.text_model("bert-classifier"), texts(), len(zoo.SENTENCES)),
    "swin": lambda: (zoo.timm_model(zoo.SWIN, zoo.SWIN_ARGUMENTS), zoo.pixels(2, 1), 2),
}


def counted(module: nn.Module, batch: Any, samples: int) -> dict[str, int]:
    """Multiply-accumulates per sample of all linear layers and convolutions, by hooks on one forward pass."""
    found: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def count(child: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(child, nn.Conv2d):
                places = output.shape[0] * output.shape[2] * output.shape[3]
            else:
                places = args[0].numel() // child.in_features
            found[name] += places * child.weight.numel()

        return count

    kinds = (nn.Linear, nn.Conv2d)
    handles = [
        child.register_forward_hook(hook(name)) for name, child in module.named_modules() if isinstance(child, kinds)
    ]
    with torch.no_grad():
        module(**batch) if isinstance(batch, dict) else module(batch)
    for handle in handles:
        handle.remove()
    return {name: count // samples for name, count in found.items()}


def described(kind: str, folder: Path) -> tuple[nn.Module, dict[str, int], dict[str, Any]]:
    """A model with layers in every form and quantized tables, the count by hooks, and what its checkpoint says."""
    module, batch, samples = BUILD[kind]()
    model = from_module(module)
    macs = {layer.name: layer.macs for layer in find_layers(model, batch).layers}
    save(checkpoint_files(compressed(module), {"architecture": model.architecture}, macs=macs), folder)
    return module, counted(module, batch, samples), inspect(folder)


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_compute_is_what_hooks_count(kind: str, tmp_path: Path) -> None:
    module, wanted, info = described(kind, tmp_path)
    layers = {row["layer"]: row for row in info["layers"] if row["kind"] != "embedding"}
    assert {name: row["float_macs"] for name, row in layers.items()} == wanted
    forms = {row["form"] for row in layers.values()}
    assert forms == {"Q", "LR", "QLR", "TCQ"}
    for name, row in layers.items():
        weight = module.get_submodule(name).weight
        rows, columns = weight.shape[0], weight[0].numel()
        places, factors = wanted[name] // (rows * columns), (row["rank"] or 0) * (rows + columns)
        dense = 0 if row["form"] == "LR" else rows * columns
        assert row["stored_macs"] == places * (dense + factors)
        bits = dense * (row["bits"] or 0)
        bits += (row["rank"] or 0) * (rows * (row["bits_a"] or 0) + columns * (row["bits_b"] or 0))
        assert row["bit_operations"] == places * bits * 32
        assert row["nominal_bits"] == pytest.approx(bits / weight.numel())
        assert row["effective_bits"] == 8 * row["bytes"] / weight.numel()
        assert row["activation_bits"] == 32
    totals = info["totals"]
    assert totals["per"] == "sample"
    assert totals["float_macs"] == sum(wanted.values())
    assert totals["float_bit_operations"] == 32 * 32 * sum(wanted.values())
    assert totals["bit_operations"] == sum(row["bit_operations"] for row in layers.values())
    assert totals["product_macs"] == 0


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_average_bits_are_those_of_all_weights(kind: str, tmp_path: Path) -> None:
    module, _, info = described(kind, tmp_path)
    sizes, totals = info["sizes"], info["totals"]
    floating = [buffer for name, buffer in module.state_dict().items() if buffer.is_floating_point()]
    assert totals["weights"] == sum(tensor.numel() for tensor in floating)
    parts = sizes["bytes"] + sizes["rest_bytes"] + sizes.get("embedding_bytes", 0)
    assert totals["effective_bits"] == pytest.approx(8 * parts / totals["weights"])
    assert totals["layers"]["weights"] == sizes["float_bytes"] // 4
    assert totals["layers"]["effective_bits"] == pytest.approx(8 * sizes["bytes"] / totals["layers"]["weights"])
    tables = [row for row in info["layers"] if row["kind"] == "embedding"]
    assert len(tables) == sum(type(child) is nn.Embedding for child in module.modules())
    assert all("stored_macs" not in row and row["effective_bits"] > row["nominal_bits"] for row in tables)


def test_layers_that_run_twice_count_twice(tmp_path: Path) -> None:
    module, batch = SharedNet(), torch.randn(3, 4, 6)
    layers = find_layers(from_module(module), batch).layers
    macs = {layer.name: layer.macs for layer in layers}
    copy = deepcopy(module)
    codes = {name: random_layer(name, module.get_submodule(name), 6) for name in macs}
    replace_layers(copy, codes, {layer.name: list(layer.aliases) for layer in layers})
    save(checkpoint_files(copy, {"architecture": {"family": "custom"}}, macs=macs), tmp_path)
    found = {row["layer"]: row["float_macs"] for row in inspect(tmp_path)["layers"]}
    assert found["twice"] == 2 * 4 * 6 * 6
    assert found["first"] == 2 * 4 * 6 * 6, "with the module that shares its weight"


def test_a_run_records_what_its_calibration_data_need(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, data = TokenNet(width=16, blocks=1).eval(), [images(4, seed) for seed in range(2)]
    search = {"samples": 8, "points": 2, "hessian_mode": "exact", "factor_bits": [4, 8]}
    mlorq.compress(module, data, budget="5bit", preset="quick", rounding="nearest", search=search).save(str(tmp_path))
    info, wanted = inspect(tmp_path), counted(module, data[0], 4)
    assert {row["layer"]: row["macs"] for row in info["layers"]} == wanted
    assert info["totals"]["per"] == "sample"


def test_without_a_record_every_layer_counts_with_one_position(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = BUILD["vit"]()[0]
    save(checkpoint_files(compressed(module), {"architecture": from_module(module).architecture}), tmp_path)
    info = inspect(tmp_path)
    assert info["totals"]["per"] == "position"
    assert all(row["float_macs"] == module.get_submodule(row["layer"]).weight.numel() for row in info["layers"])
    print_checkpoint(info, Console(width=300))
    out = capsys.readouterr().out
    assert "MACs and bit operations per position" in out
    assert "does not record the positions per sample" in out


def test_people_see_bits_and_compute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, info = described("bert", tmp_path)
    print_checkpoint(info, Console(width=300))
    out = " ".join(capsys.readouterr().out.split())
    totals = info["totals"]
    assert f"MACs {amount(totals['stored_macs'])} per sample, float {amount(totals['float_macs'])}" in out
    share = totals["bit_operations"] / totals["float_bit_operations"]
    assert f"bit operations {amount(totals['bit_operations'])} per sample, {share:.2%} of float's" in out
    assert f"{totals['effective_bits']:.2f} bits per weight of {totals['weights']:,}" in out
    first = info["layers"][0]
    assert f"{first['nominal_bits']:.2f} {first['effective_bits']:.2f} {first['bytes']:,}" in out
    assert "not record" not in out


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, ""), (7, "7"), (1000, "1k"), (999_499, "999k"), (999_500, "1M"), (58_123_456, "58.1M"), (10**13, "10T")],
)
def test_amounts(count: int | None, shown: str) -> None:
    assert amount(count) == shown


@pytest.mark.parametrize("wrong", [-1, 2.0, "7", True])
def test_macs_have_to_be_numbers(wrong: Any, tmp_path: Path) -> None:
    described("vit", tmp_path)
    edit(tmp_path, lambda config: config["layers"][0].update(macs=wrong))
    with pytest.raises(CheckpointError, match=r"mlorq\.json is damaged: macs of layer 'patch_embed\.proj' must be"):
        inspect(tmp_path)

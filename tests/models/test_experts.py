"""Experts are compressed: matrices of one parameter, and layers whose tokens belong to samples one at a time only."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mlorq
from mlorq.artifacts.store import Store
from mlorq.checkpoint.io import inspect
from mlorq.errors import CheckpointError, ModelError
from mlorq.forms.trial import changed_by_replacement
from mlorq.models import from_module
from mlorq.models.arrangement import Arrangement
from mlorq.models.direct import WeightView
from mlorq.models.direct_weights import arrange, arrangement_of
from mlorq.models.layer_list import UNUSED
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.models.stacked import ParameterStack
from tests.long import few
from tests.models.experts import CONFIGS, STACKED, Experts, library_model, texts, tokens_of
from tests.zoo import FAST

pytestmark = pytest.mark.filterwarnings("ignore:statistics are taken one sample at a time:UserWarning")

ALL = {f"{name}.{index}" for name in ("up", "down") for index in range(3)} | {"first", "head"}
UNEVEN = tokens_of([0, 1, 1, 2, 2], [0, 0, 0, 1, 2], [2, 2, 2, 2, 1], [1, 0, 0, 0, 1])


def outputs(module: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        found = module(batch) if isinstance(batch, Tensor) else module(**batch).logits
    return found


# -- models of transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_layers_and_the_function_is_kept(kind: str) -> None:
    module, batch = library_model(kind), texts(kind)
    with torch.no_grad():
        wanted = module(**batch).logits
    model = from_module(deepcopy(module))
    with pytest.warns(UserWarning, match="statistics are taken one sample at a time"):
        found = find_layers(model, batch, more=[texts(kind, 8, seed=2)])
    experts = [layer for layer in found.layers if "expert" in layer.name]
    stacks = arrangement_of(model.module).stacks
    assert len(stacks) == (2 if kind in STACKED else 0)
    assert len(experts) == 4 * 2 * (1 if kind in STACKED else 2)
    assert {layer.name for layer in experts} <= set(found.alone)
    assert not found.skipped
    assert changed_by_replacement(model, experts, batch) == {}
    tables = sum(value.numel() for name, value in module.named_parameters() if "embed" in name or "shared" in name)
    every = sum(value.numel() for value in module.parameters() if value.dim() > 1) - tables
    assert found.params >= 0.9 * every
    assert torch.allclose(outputs(model.module, batch), wanted, atol=1e-5)
    assert torch.equal(outputs(module, batch), wanted)  # the model that was copied


@pytest.mark.parametrize("kind", few(CONFIGS, "Mixtral"))
def test_a_checkpoint_of_experts_has_the_outputs_and_the_original_names(kind: str, tmp_path: Any) -> None:
    module, batch = library_model(kind), texts(kind, 4)
    result = mlorq.compress(module, [batch], budget="8bit", rounding="nearest", search=FAST, device="cpu")
    assert [layer for layer in result.allocation["layer"].to_pylist() if "expert" in layer]
    folder = str(tmp_path / "checkpoint")
    result.save(folder)
    wanted = outputs(result.model, batch)
    assert torch.equal(outputs(mlorq.load(folder), batch), wanted)
    stacks = inspect(folder)["extra"].get("arranged", {}).get("stacks", [])
    assert len(stacks) == (2 if kind in STACKED else 0)
    mlorq.export(folder, str(tmp_path / "dense.safetensors"))
    dense = load_file(tmp_path / "dense.safetensors")
    own = {name: value.shape for name, value in module.state_dict().items() if name in dense}
    assert {name: value.shape for name, value in dense.items()} == own
    module.load_state_dict(dense, strict=False)
    assert set(stacks) <= set(dense)
    assert torch.allclose(outputs(module, batch), wanted, atol=1e-4)
    torch.save((batch, wanted), tmp_path / "outputs.pt")
    code = (
        "import sys, torch, mlorq\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"  # sums of other numbers of threads round differently
        "batch, wanted = torch.load(sys.argv[1] + '/outputs.pt')\n"
        "with torch.no_grad():\n    assert mlorq.load(sys.argv[1] + '/checkpoint')(**batch).logits.equal(wanted)\n"
    )
    if kind != "Mixtral":  # the default run stays short
        subprocess.run([sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())], check=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", STACKED)
def test_folders_for_transformers_hold_experts(kind: str, tmp_path: Any) -> None:
    module, batch = library_model(kind), texts(kind, 4)
    result = mlorq.compress(module, [batch], budget="8bit", rounding="nearest", search=FAST, device="cpu")
    result.save(str(tmp_path / "checkpoint"))
    mlorq.export(str(tmp_path / "checkpoint"), str(tmp_path / "folder"), to="transformers")
    loaded, report = type(module).from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(outputs(loaded, batch), outputs(result.model, batch))


@pytest.mark.long
@pytest.mark.parametrize("method", ["closed_form", "erq", "block", "qdrop"])
@pytest.mark.parametrize("samples", [1, 4])
def test_rounding_methods_take_experts(method: str, samples: int) -> None:
    module = library_model("Mixtral")
    batches = [texts("Mixtral", samples, seed=seed) for seed in range(8 // samples)]
    activations = {"bits": 8} if method == "qdrop" else None
    result = mlorq.compress(
        module,
        batches,
        budget="6bit",
        rounding=method,
        rounding_iterations=None if method == "closed_form" else 5,
        search={**FAST, "token_weights": True},
        activations=activations,
        device="cpu",
    )
    assert len([name for name in result.allocation["layer"].to_pylist() if "experts" in name]) == 8
    assert result.metrics["nmse"] < 0.05


# -- which layers --------------------------------------------------------------------------------------------------


def test_matrices_of_one_parameter_are_layers_of_their_own() -> None:
    module = Experts().eval()
    weights = {"up": module.up.detach().clone(), "down": module.down.detach().clone()}
    wanted = outputs(module, UNEVEN)
    found = find_layers(from_module(module), UNEVEN)
    assert {layer.name for layer in found.layers} == ALL
    assert set(found.alone) == ALL - {"first", "head"}
    assert not found.skipped
    assert not found.others
    assert arrangement_of(module) == Arrangement(stacks=("up", "down"), transposed=("down",))
    for index in range(3):
        assert torch.equal(weight_matrix(module.up.get_submodule(str(index))), weights["up"][index])
        assert torch.equal(weight_matrix(module.down.get_submodule(str(index))), weights["down"][index].T)
    assert torch.allclose(outputs(module, UNEVEN), wanted, atol=1e-6)
    arranged = arrangement_of(module)
    assert Arrangement.from_json(arranged.to_json()) == arranged
    arrange(module, arranged)  # again: nothing changes
    assert arrangement_of(module) == arranged


def test_an_expert_that_only_a_later_batch_reaches_is_compressed_in_its_place() -> None:
    first, later = tokens_of([0, 2, 2], [0, 0, 2]), tokens_of([1, 1, 0], [2, 1, 1])
    model = from_module(Experts().eval())
    with pytest.warns(UserWarning, match="one sample at a time"):
        found = find_layers(model, first, more=[first, later])
    names = [layer.name for layer in found.layers]
    assert names == ["first", "up.0", "down.0", "up.1", "down.1", "up.2", "down.2", "head"]
    assert [layer.order for layer in found.layers] == list(range(8))
    assert len({layer.input_group for layer in found.layers}) == 8
    assert set(found.alone) == ALL - {"first", "head"}


def test_an_expert_that_no_token_reaches_stays_float_with_that_reason(tmp_path: Any) -> None:
    batch = tokens_of([0, 2, 2], [0, 0, 2], [2, 0, 2], [2, 2, 2])
    module = Experts().eval()
    result = mlorq.compress(module, [batch], budget="16bit", rounding="nearest", search=FAST, device="cpu")
    assert {one.name: one.reason for one in result.left_float} == {"up.1": UNUSED, "down.1": UNUSED}
    result.save(str(tmp_path))
    loaded = mlorq.load(str(tmp_path), model=module)
    other = tokens_of([1, 1, 2])
    assert torch.equal(outputs(loaded, other), outputs(result.model, other))


def test_batches_of_one_sample_show_experts_too() -> None:
    module = Experts().eval()
    found = find_layers(from_module(module), UNEVEN[:1], more=[UNEVEN[1:2]])
    assert set(found.alone) == ALL - {"first", "head"}


class Listed(Experts):
    """The same experts as layers, of which those without tokens are called, too."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens, chosen = self.first(x).flatten(0, 1), self.chosen(x.flatten(0, 1))
        out = torch.zeros_like(tokens)
        for expert, layer in enumerate(self.ups):
            (rows,) = torch.where(chosen == expert)
            out = out.index_add(0, rows, layer(tokens[rows]))
        return self.head(torch.tanh(out).unflatten(0, x.shape[:2]).mean(1))


def test_calls_without_tokens_reach_no_layer_and_share_no_input() -> None:
    batch = tokens_of([0, 0, 0], [0, 0, 0])
    model = from_module(Listed().eval())
    found = find_layers(model, batch)
    assert {one.name: one.reason for one in found.skipped} == {"ups.1": UNUSED, "ups.2": UNUSED}
    later = find_layers(model, batch, more=[UNEVEN])
    names = [layer.name for layer in later.layers]
    assert names == ["first", "ups.0", "ups.1", "ups.2", "head"]
    assert len({layer.input_group for layer in later.layers}) == 5
    assert later.blocks == []
    result = mlorq.compress(
        model.module, [batch, UNEVEN], budget="16bit", rounding="closed_form", search=FAST, device="cpu"
    )
    assert set(result.allocation["layer"].to_pylist()) == set(names)


class Table(nn.Module):
    """A layer on a table of positions, whose rows belong to no sample; not even to one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.head = nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("table", torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.positions(self.table).mean(0))


def test_a_table_of_positions_is_none_of_the_samples() -> None:
    found = find_layers(from_module(Table().eval()), torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
    assert [layer.name for layer in found.layers] == ["head"]
    assert found.alone == ()
    assert [one.name for one in found.skipped] == ["positions"]
    assert "5 rows for 4 samples" in found.skipped[0].reason


class Coupled(Experts):
    """A sample's outputs depend on the other samples: one at a time, it is another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


def test_samples_that_depend_on_each_other_are_not_taken_apart() -> None:
    found = find_layers(from_module(Coupled().eval()), UNEVEN)
    assert {layer.name for layer in found.layers} == {"first", "head"}
    assert found.alone == ()
    assert {one.name for one in found.skipped} == ALL - {"first", "head"}


# -- in place of the parameter -------------------------------------------------------------------------------------


def test_everything_else_sees_the_dense_parameter() -> None:
    value = nn.Parameter(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)))
    for transposed in (False, True):
        stack = ParameterStack.of(value, transposed)
        assert torch.equal(stack.dense, value)
        assert stack.shape == value.shape
        assert (stack.dtype, stack.device, stack.ndim, len(stack)) == (value.dtype, value.device, 3, 3)
        assert all(isinstance(stack[index], WeightView) for index in (1, -1, torch.tensor(2)))
        assert torch.equal(stack[-1].dense, value[2])
        assert [torch.equal(one.dense, own) for one, own in zip(stack, value, strict=True)] == [True] * 3
        assert [torch.equal(one.dense, own) for one, own in zip(stack.unbind(), value, strict=True)] == [True] * 3
        seen: list[Tensor] = []
        stack.get_submodule("1").register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        wide, narrow = torch.ones(2, 6), torch.ones(2, 4)
        assert torch.allclose(wide @ stack[1], wide @ value[1], atol=1e-6)
        assert torch.allclose(narrow @ stack[1].T, narrow @ value[1].T, atol=1e-6)
        assert [len(one[0]) for one in seen] == [6 if transposed else 4]  # the layer's product, and a dense one
        for index in (slice(1), torch.tensor([0, 2]), (1, 2), torch.tensor([True, False, True]), None):
            assert torch.equal(stack[index], value[index])
        assert torch.equal(stack.transpose(1, 2), value.transpose(1, 2))
        assert torch.equal(torch.bmm(torch.ones(3, 2, 6), stack), torch.bmm(torch.ones(3, 2, 6), value))
        assert torch.equal(stack + 1, value + 1)
        with pytest.raises(IndexError, match="index 3 is out of range for 3 matrices"):
            stack[3]


def test_a_recorded_graph_would_keep_the_examples_experts_and_is_refused() -> None:
    module = Experts().eval()
    find_layers(from_module(module), UNEVEN)
    with pytest.raises(ModelError, match="the inputs choose the experts"):
        torch.jit.trace(module, UNEVEN)


class Whole(Experts):
    """Reads all matrices at once as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up.mean() + self.down[:2].mean()


def test_a_parameter_that_is_also_read_whole_stays_float_and_named() -> None:
    module = Whole().eval()
    wanted = outputs(module, UNEVEN)
    found = find_layers(from_module(module), UNEVEN)
    assert {one.name for one in found.others} == {"up", "down"}
    assert all("read by" in one.reason for one in found.others)
    assert torch.allclose(outputs(module, UNEVEN), wanted, atol=1e-6)


def test_a_model_without_such_a_parameter_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the model has no stack of matrices 'first"):
        arrange(Experts(), Arrangement(stacks=("first.weight",)))


def test_experts_that_stay_float_keep_their_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlorq.models import direct_weights

    module, batch = library_model("Mixtral"), texts("Mixtral")
    before = module.config._experts_implementation
    assert before != "eager"
    monkeypatch.setattr(direct_weights, "_kept", lambda *_: [])
    find_layers(from_module(module), batch)
    assert module.config._experts_implementation == before


def test_first_order_costs_of_experts_are_taken_one_sample_at_a_time(tmp_path: Any) -> None:
    search = {"sensitivity": "first_order", "forms": ["Q"], "hessian_samples": 4, "samples": 4}
    options = {"preset": "quick", "rounding": "nearest", "device": "cpu", "store": f"file://{tmp_path}"}
    mlorq.compress(Experts(), [UNEVEN], budget="16bit", search=search, **options)
    store = Store(f"file://{tmp_path}")
    rows = [
        row for ref in store.refs("sensitivity") for row in store.read_table(ref, "sensitivity.parquet").to_pylist()
    ]
    assert {row["how"] for row in rows} == {"measured", "first_order"}
    for row in rows:  # few outputs: they are taken exactly
        assert row["global_cost"] == pytest.approx(row["first_order"], rel=1)

"""A layer is more than its class: hooks, a forward on the instance, computed weights. Its function is kept."""

from __future__ import annotations

import threading
import types
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mlorq
from mlorq.checkpoint.io import load
from mlorq.errors import ModelError
from mlorq.models import from_module
from mlorq.models.copying import copy_module
from mlorq.models.layers import find_layers
from mlorq.models.partial_forward import Segments

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))


def three_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def skipped(module: nn.Module) -> dict[str, str]:
    return {one.name: one.reason for one in find_layers(from_module(module), inputs()).skipped}


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Wrapped(nn.Linear):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


def with_hook(module: nn.Sequential) -> str:
    module[2].register_forward_hook(doubled)
    return "a hook runs with it: doubled"


def with_pre_hook(module: nn.Sequential) -> str:
    module[2].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    return "a hook runs with it: <lambda>"


def with_own_forward(module: nn.Sequential) -> str:
    layer = module[2]
    layer.forward = types.MethodType(lambda self, x: 2 * x @ self.weight.T, layer)
    return "its forward was replaced on the instance"


def with_own_call(module: nn.Sequential) -> str:
    module[2] = Wrapped(16, 16)
    return "Wrapped has a call of its own"


def with_random_weight(module: nn.Sequential) -> str:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    parametrize.register_parametrization(module[2], "weight", Noise())
    return "its weight is computed on every access"


@pytest.mark.parametrize("change", [with_hook, with_pre_hook, with_own_forward, with_own_call, with_random_weight])
def test_such_a_layer_stays_float_and_is_named_and_others_are_found(change):
    module = three_layers()
    reason = change(module)
    assert skipped(module)["2"].startswith(reason)
    assert [layer.name for layer in find_layers(from_module(module), inputs()).layers] == ["0", "4"]


@pytest.mark.parametrize("change", [with_hook, with_pre_hook, with_own_forward, with_own_call])
def test_the_compressed_model_has_the_function_of_the_given_one(change):
    module = three_layers()
    change(module)
    wanted = module(inputs()).detach()
    with pytest.warns(UserWarning, match=r"layers stay float.*'2' \(1,024 B"):
        result = mlorq.compress(module, [inputs(), inputs(2)], budget="40%", device="cpu", **QUICK)
    assert error(result.model(inputs()), wanted) < 1e-2
    assert set(result.allocation["layer"].to_pylist()) == {"0", "4"}
    assert torch.equal(module(inputs()), wanted), "the given model is as it was"


def computed(kind: str) -> nn.Module:
    module = three_layers()
    if kind == "parametrized":
        parametrizations.weight_norm(module[0])
        parametrizations.spectral_norm(module[2])
    elif kind == "hooks":
        module[0] = torch.nn.utils.weight_norm(module[0])
        module[2] = torch.nn.utils.spectral_norm(module[2])
        module(inputs())
    else:
        prune.l1_unstructured(module[0], "weight", 0.3)
        prune.random_unstructured(module[2], "bias", 0.5)
    return module.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrized", "hooks", "pruned"])
def test_computed_weights_are_compressed_by_their_values(kind, tmp_path):
    module = computed(kind)
    wanted = module(inputs()).detach()
    result = mlorq.compress(module, [inputs(), inputs(2)], budget="40%", exclude=["2"], device="cpu", **QUICK)
    assert result.allocation["layer"].to_pylist() == ["0", "4"]
    assert error(result.model(inputs()), wanted) < 1e-2
    # The checkpoint has plain weights; it loads into the model as the user builds it.
    result.save(str(tmp_path))
    again = load(str(tmp_path), model=computed(kind))
    assert torch.equal(again(inputs()), result.model(inputs()))


def test_parametrized_layers_are_not_taken_for_one():
    # Their weights are temporary tensors, which may get one address.
    module = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(12, 12)) for _ in range(4)]).eval()
    listed = find_layers(from_module(module), inputs())
    assert [(layer.name, layer.aliases) for layer in listed.layers] == [(str(index), ()) for index in range(4)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def test_blocks_keep_their_own_forward_and_hooks_are_not_run_twice():
    torch.manual_seed(0)
    module = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(12, 3)).eval()
    module[0].forward = types.MethodType(lambda self, x: x + 5 * torch.tanh(self.layer(x)), module[0])
    module[1].register_forward_hook(doubled)
    model = from_module(module)
    wanted = model.outputs(module, inputs())
    segments = Segments(model, module, ["0", "1", "2"])
    carry = segments.advance(inputs(), 0, None, 2)
    assert torch.equal(segments.outputs(inputs(), 2, carry), wanted)
    assert torch.equal(model.outputs(module, inputs()), wanted)
    assert "forward" in vars(module[0])
    assert "forward" not in vars(module[1])
    assert len(module[1]._forward_hooks) == 1


def test_a_block_that_writes_into_its_input_leaves_the_stored_output():
    module = nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 3)).eval()
    model = from_module(module)
    segments = Segments(model, module, ["0", "1"])
    carry = segments.advance(inputs(), 0, None, 1)
    before = carry.clone()
    segments.outputs(inputs(), 1, carry)
    assert torch.equal(carry, before)


def test_what_cannot_be_copied_is_shared():
    module = three_layers()
    lock, generator = threading.Lock(), (number for number in range(3))
    module.state = {"lock": lock, "names": ["a"], "rows": generator}
    module[0].owner = types.SimpleNamespace(lock=lock, count=[1])
    twin = copy_module(module)
    assert twin.state["lock"] is lock
    assert twin[0].owner.lock is lock
    assert twin.state["names"] is not module.state["names"]
    assert twin[0].owner.count is not module[0].owner.count
    assert twin[0].weight is not module[0].weight
    assert torch.equal(twin(inputs()), module(inputs()))
    result = mlorq.compress(module, [inputs(), inputs(2)], budget="40%", device="cpu", **QUICK)
    assert len(result.allocation) == 3


def test_a_model_that_refuses_to_be_copied_is_one_line():
    class Refusing(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("copies are not allowed")

    with pytest.raises(ModelError, match="the model cannot be copied: RuntimeError: copies are not allowed"):
        copy_module(nn.Sequential(Refusing(2, 2)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_values_that_a_computation_left_are_copied():
    module = torch.nn.utils.weight_norm(nn.Conv1d(2, 3, 1)).eval()
    module(torch.randn(1, 2, 4))
    with pytest.raises(RuntimeError, match="graph leaves"):
        deepcopy(module)
    x = torch.randn(1, 2, 4)
    assert torch.equal(copy_module(module)(x), module(x))


class PropertyWeight(nn.Linear):
    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]


def test_a_weight_that_is_a_property_of_the_class_is_computed():
    module = three_layers()
    module[2].__class__ = PropertyWeight
    assert skipped(module)["2"] == "its weight is computed on every access"


def test_functions_on_an_instance_work_on_the_copy():
    torch.manual_seed(0)
    module = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(12, 3)).eval()
    first, second, third = module[0], module[1], module[2]
    whole, part = first.forward, second.forward
    first.forward = lambda x: 2 * whole(x)
    second.forward = lambda x, inner=part: inner(x) - 1
    third.register_forward_hook(lambda _, args, output: output + first.layer(args[0]))
    twin = copy_module(module)
    x = inputs()
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any(), "nothing of the copy computes with the original's weights"
    wanted = module(x).detach()
    assert wanted.any()
    result = mlorq.compress(module, [x, inputs(2)], budget="40%", device="cpu", **QUICK)
    assert len(result.allocation) == 4
    assert error(result.model(x), wanted) < 1e-2


def test_compression_works_inside_modes_without_gradients():
    module = three_layers()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = mlorq.compress(module, [inputs(), inputs(2)], budget="40%", device="cpu", **QUICK)
        assert len(result.allocation) == 3
        assert not result.left_float

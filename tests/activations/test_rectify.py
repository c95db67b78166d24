"""ReLU in place of GELU: which MLPs, with which weights, and what a checkpoint keeps of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlorq
from mlorq.activations.calibrate import calibrate
from mlorq.activations.plan import ActivationPlan, RectifiedMlp
from mlorq.activations.rectify import CLIPPED, PERCENTILE, find_mlps, linear, observe, rectify, relative_error, train
from mlorq.activations.settings import RectifyingSettings
from mlorq.calibration.output_divergence import TEMPERATURE
from mlorq.checkpoint.io import inspect
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel
from mlorq.models.layers import find_layers
from mlorq.rounding.paired_forward import PairedForward
from tests import zoo
from tests.nets import float_model

SEARCH = {"samples": 8, "hessian_probes": 2}


class Mlp(nn.Module):
    """A residual MLP; ``kind`` says how it computes GELU."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.act = nn.Tanh() if kind == "tanh" else nn.GELU("tanh" if kind == "approximate" else "none")
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x))
        hidden = F.gelu(hidden) if self.kind == "functional" else self.act(hidden)
        hidden = hidden * 2 if self.kind == "scaled" else self.act(hidden) if self.kind == "twice" else hidden
        return x + self.down(self.drop(hidden))


def net(seed: int, *kinds: str) -> tuple[FloatModel, list[Tensor]]:
    torch.manual_seed(seed)
    module = nn.Sequential(*(Mlp(kind) for kind in kinds), nn.Flatten(), nn.Linear(40, 6))
    for parameter in module.parameters():
        parameter.data *= 2
    generator = torch.Generator().manual_seed(seed)
    return float_model(module), [torch.randn(samples, 5, 8, generator=generator) for samples in (6, 9)]


def listed(model: FloatModel, batches: list[Any]) -> list[Any]:
    return find_layers(model, batches[0]).layers


def settings(**values: Any) -> RectifyingSettings:
    return RectifyingSettings(method="rectified", **values)


def test_mlps_are_found_by_what_they_compute(seed: int) -> None:
    model, batches = net(seed, "exact", "functional", "approximate", "tanh", "scaled", "twice")
    found = find_mlps(model, listed(model, batches), batches[0])
    assert found == [RectifiedMlp(f"{index}.act", (f"{index}.up", f"{index}.down")) for index in (0, 2)]
    assert not find_mlps(model, [], batches[0]), "layers that stay float keep their GELU"


def test_weights_and_limit_are_those_of_explicit_perturbations(seed: int) -> None:
    model, batches = net(seed, "exact", "exact")
    mlp = find_mlps(model, listed(model, batches), batches[0])[0]
    data = observe(model, mlp, batches, weighted=True)
    module, step = model.module.double(), 1e-4
    hidden, sums, inputs, outputs = [], torch.zeros(5, 8, dtype=torch.float64), [], []
    for batch in (batch.double() for batch in batches):
        block = module[0]
        assert isinstance(block, Mlp)
        with torch.no_grad():
            x = block.norm(batch)
            values = F.gelu(block.up(x))
            y = block.down(values)
            reference = (module(batch) / TEMPERATURE).softmax(1)
        inputs.append(x.flatten(0, 1))
        outputs.append(y.flatten(0, 1))
        hidden.append(values.flatten())
        gradients = []
        for sign in (1, -1):
            entry = (y + sign * step).requires_grad_(True)
            with torch.enable_grad():
                own = (module[1:](batch + entry) / TEMPERATURE).log_softmax(1)
                total = (reference * (reference.log() - own)).sum()
            gradients.append(torch.autograd.grad(total, entry)[0])
        sums += (gradients[0] - gradients[1]).abs().sum(0)
    model.module.float()
    expected = (sums / sums.mean()).float()
    rows = torch.cat([expected.expand(len(batch), 5, 8).flatten(0, 1) for batch in batches])
    torch.testing.assert_close(data.weights, rows, rtol=0.03, atol=0.03)
    torch.testing.assert_close(data.inputs, torch.cat(inputs).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(data.outputs, torch.cat(outputs).float(), rtol=1e-4, atol=1e-4)
    positive = sorted(value for value in torch.cat(hidden).tolist() if value > 0)
    assert sum(value <= data.limit + 1e-5 for value in positive) / len(positive) == pytest.approx(PERCENTILE, abs=0.02)


@pytest.mark.parametrize("weighted", [True, False])
def test_training_lowers_the_error_that_the_paper_names(seed: int, weighted: bool) -> None:
    model, batches = net(seed, "exact", "exact")
    mlp = find_mlps(model, listed(model, batches), batches[0])[1]
    data = observe(model, mlp, batches, weighted=weighted)
    start = {
        f"mlp.{name}.{part}": value
        for name in mlp.layers
        for part, value in linear(model.module, name).named_parameters()
    }
    everything = torch.arange(len(data.inputs))
    h = torch.ones_like(data.outputs) if data.weights is None else data.weights

    def error(own: dict[str, Tensor]) -> float:
        hidden = torch.relu(data.inputs @ own["mlp.1.up.weight"].T + own["mlp.1.up.bias"])
        total = 0.0
        for weight, values in ((1.0, hidden), (CLIPPED, hidden.clamp(max=data.limit))):
            output = values @ own["mlp.1.down.weight"].T + own["mlp.1.down.bias"]
            total += weight * float((h * (output - data.outputs).square()).sum())
        return total / float((h * data.outputs.square()).sum())

    trained = train(start, mlp, data, settings(mlp_iterations=150, mlp_rate=3e-3), seed)
    for own in (start, trained):
        assert float(relative_error(own, mlp, data, everything)) == pytest.approx(error(own), rel=1e-3)
    assert error(trained) < 0.6 * error(start)
    for rate in (1e3, 1e30):  # steps that are far too large: the second one ends in numbers that are none
        kept = train(start, mlp, data, settings(mlp_iterations=5, mlp_rate=rate), seed)
        assert all(torch.equal(kept[name], start[name]) for name in start)


def test_the_rectified_model_is_nearer_than_relu_alone(seed: int) -> None:
    model, batches = net(seed, "exact", "approximate")
    layers = listed(model, batches)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    mlps, tensors = rectify(model, layers, batches, settings(mlp_iterations=200, mlp_rate=3e-3), seed=seed)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    plain = {f"mlp.{name}.{part}": before[f"{name}.{part}"] for mlp in mlps for name in mlp.layers
             for part in ("weight", "bias")}  # fmt: skip
    errors = []
    with torch.no_grad():
        wanted = model.module(batches[1])
        for own in (plain, tensors):
            module = net(seed, "exact", "approximate")[0].module
            module.load_state_dict(before)
            ActivationPlan([], [], own, mlps).fold(module)
            assert isinstance(module[0].act, nn.ReLU)
            assert isinstance(module[1].act, nn.ReLU)
            errors.append(float((module(batches[1]) - wanted).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_a_plan_keeps_its_mlps(seed: int) -> None:
    model, batches = net(seed, "exact", "tanh")
    plan = calibrate(model, listed(model, batches), batches, settings(bits=6, mlp_iterations=5), seed=seed)
    assert [mlp.activation for mlp in plan.mlps] == ["0.act"]
    again = ActivationPlan.from_json(plan.to_json(), plan.tensors)
    assert again.mlps == plan.mlps
    assert again.at({}).mlps == plan.mlps
    assert set(again.at({}).tensors) == set(plan.tensors)
    old = {key: value for key, value in plan.to_json().items() if key != "mlps"}
    assert not ActivationPlan.from_json(old).mlps
    assert "mlps" not in replace(plan, mlps=()).to_json(), "checkpoints without them stay as they were"
    with pytest.raises(ModelError, match="does not fit the model"):
        replace(plan, mlps=[RectifiedMlp("5.act", ("0.up", "0.down"))]).install(model.module)
    for name in ("", "0", "0.up"):
        with pytest.raises(ModelError, match="is no activation function"):
            replace(plan, mlps=[RectifiedMlp(name, ("0.up", "0.down"))]).install(deepcopy(model.module))
    with pytest.raises(ValueError, match="not a text"):
        replace(plan, mlps=[RectifiedMlp(3, ("0.up", "0.down"))]).check()  # type: ignore[arg-type]


def test_blocks_aim_at_the_model_as_given(seed: int) -> None:
    model, batches = net(seed, "exact", "exact", "exact")
    layers = find_layers(model, batches[0])
    plan = calibrate(model, layers.layers, batches, settings(bits=8, mlp_iterations=5), seed=seed)
    module = net(seed, "exact", "exact", "exact")[0].module
    plan.fold(module)
    blocks = ["0", "1", "2"]
    paired = PairedForward(replace(model, module=module), blocks, batches, activations=plan, teacher=model)
    for block in (0, 2):
        for call, batch in zip(paired.block_calls(block, outputs=True, float_inputs=True), batches, strict=True):
            with torch.no_grad():
                given = model.module[:block](batch)
                torch.testing.assert_close(call.float_input, given)
                torch.testing.assert_close(call.target, model.module[block](given))
                torch.testing.assert_close(call.outputs, model.module(batch))
                inputs = paired.compressed[:block](batch)
            torch.testing.assert_close(call.args[0], inputs)


@pytest.mark.parametrize("rounding", ["aphq", "glfq"])
def test_a_checkpoint_has_relu(rounding: str, seed: int, tmp_path: Path) -> None:
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(6, seed + index) for index in range(3)]
    result = mlorq.compress(
        module,
        batches,
        budget="4bit",
        preset="quick",
        search=SEARCH,
        rounding={"method": rounding, "iterations": 4, "batch_size": 4},
        activations={"bits": 6, "method": "rectified", "mlp_iterations": 5},
    )
    result.save(tmp_path / "out")
    assert inspect(tmp_path / "out")["format_version"] == 3, "earlier versions would compute GELU"
    loaded = mlorq.load(tmp_path / "out")
    assert all(isinstance(block.mlp.act, nn.ReLU) for block in loaded.blocks)
    assert all(isinstance(block.mlp.act, nn.GELU) for block in module.blocks), "the given model is not changed"
    with torch.no_grad():
        torch.testing.assert_close(loaded(batches[0]), result.model(batches[0]), rtol=1e-4, atol=1e-4)

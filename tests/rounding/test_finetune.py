"""Tuning of a whole compressed model on small nets."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from mlorq.evaluation.outputs import output_nmse
from mlorq.forms.base import Candidate
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.rounding import finetune
from mlorq.rounding.block import TuningSettings
from mlorq.rounding.finetune import tune
from tests.layers import hessian_fit, stored
from tests.nets import SharedNet, SkipNet, TokenNet, float_model, images, token_net


def realised(model: FloatModel, batch: torch.Tensor, bits: int = 3):
    """All layers by nearest rounding, the second of them in low rank with codes."""
    found = find_layers(model, batch)
    pairs = []
    for index, layer in enumerate(found.layers):
        weight = weight_matrix(model.module.get_submodule(layer.name))
        candidate = Candidate("QLR", 2, 4, 4, 2) if index == 1 else Candidate("Q", bits=bits)
        pairs.append((layer, stored(hessian_fit(weight), candidate, layer.name)))
    return found, pairs


def error_of(model: FloatModel, layers: list[CompressedLayer], batches: list[torch.Tensor]) -> float:
    module = deepcopy(model.module)
    for layer in layers:
        own = module.get_submodule(layer.layer)
        own.weight.copy_(layer.dense().reshape(own.weight.shape))
        if layer.bias is not None:
            own.bias.copy_(layer.bias)
    with torch.no_grad():
        outputs, wanted = (
            torch.cat([model.outputs(net, batch) for batch in batches]) for net in (module, model.module)
        )
    return output_nmse(outputs, wanted)


@pytest.mark.parametrize("kind", [TokenNet, SkipNet])
def test_tuning_lowers_the_error_on_samples_it_has_not_seen(kind, seed):
    model = token_net(seed, kind)
    batches = [images(8, seed * 100 + index) for index in range(20)]
    found, pairs = realised(model, batches[0])
    weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    settings = TuningSettings(tuning=150)
    steps: list[tuple[int, int]] = []
    result = tune(model, found.blocks, pairs, batches, settings, seed=seed, progress=lambda *step: steps.append(step))
    assert result.loss_after < result.loss_before
    assert steps == [(step, 150) for step in range(1, 151)]
    other = [images(8, seed * 100 + 50 + index) for index in range(10)]
    assert error_of(model, result.layers, other) < 0.8 * error_of(model, [layer for _, layer in pairs], other)
    assert all(torch.equal(value, weights[name]) for name, value in model.module.state_dict().items())
    for (_, before), after in zip(pairs, result.layers, strict=True):
        assert after.candidate == before.candidate
        for name, matrix in after.matrices.items():
            assert matrix.codes.dtype == before.matrices[name].codes.dtype
            assert int(matrix.codes.max()) < 2**matrix.bits
    again = tune(model, found.blocks, pairs, batches, settings, seed=seed)
    for one, two in zip(result.layers, again.layers, strict=True):
        assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())


def test_what_is_no_better_on_held_out_samples_is_not_kept(seed):
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(5)]
    found, pairs = realised(model, batches[0], bits=8)
    settings = TuningSettings(tuning=8, tuning_rate=100.0, scale_rate=1.0, bias_rate=10.0)
    result = tune(model, found.blocks, pairs, batches, settings)
    assert result.loss_after == result.loss_before
    assert result.layers == [layer for _, layer in pairs]


def test_modules_that_share_a_weight_are_tuned_as_one(seed):
    torch.manual_seed(seed)
    model = float_model(SharedNet())
    batches = [torch.randn(8, 5, 6) for _ in range(10)]
    found, pairs = realised(model, batches[0])
    assert found["first"].aliases == ("second",)
    before = error_of(model, [layer for _, layer in pairs], batches)
    result = tune(model, found.blocks, pairs, batches, TuningSettings(tuning=100), seed=seed)
    assert error_of(model, result.layers, batches) < before
    assert model.module.first.weight is model.module.second.weight


def test_the_float_model_runs_once_a_batch_and_nothing_changes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = token_net(0)
    batches = [images(4, index) for index in range(6)]
    found, pairs = realised(model, batches[0])
    passes: list[None] = []
    model.module.register_forward_pre_hook(lambda *_: passes.append(None))

    def run() -> tuple[list[CompressedLayer], int]:
        passes.clear()
        layers = tune(model, found.blocks, pairs, batches, TuningSettings(tuning=12), seed=3).layers
        return layers, len(passes)

    kept, few = run()
    monkeypatch.setattr(finetune, "KEPT_BYTES", 0)
    computed, many = run()
    assert many - few >= 12 + 5 * 2 - 6  # the steps' and the checks' batches, less one pass each
    for one, other in zip(kept, computed, strict=True):
        assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())

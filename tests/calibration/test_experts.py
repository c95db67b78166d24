"""Statistics of experts are those of a naive computation over samples one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import FOLDS, OuterProducts
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.calibration.token_importance import token_importance
from mlorq.models import from_module
from mlorq.models.base import FloatModel
from mlorq.models.layer_list import LayerList
from mlorq.models.layers import find_layers
from mlorq.rounding.paired_forward import PairedForward
from tests.models.experts import Experts, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:statistics are taken one sample at a time:UserWarning")

# The second expert has no token of the first batch, and the third none of some samples.
FIRST = tokens_of([0, 2, 2, 0], [0, 0, 2, 2], [2, 0, 0, 0])
SECOND = tokens_of([1, 1, 0, 2], [1, 0, 1, 0], seed=2)
EXPERTS = [f"{name}.{index}" for name in ("up", "down") for index in range(3)]


def found(seed: int = 0) -> tuple[FloatModel, LayerList, list[Tensor]]:
    module = Experts().eval()
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    model = from_module(module)
    listed = find_layers(model, FIRST, more=[SECOND])
    return model, listed, list(listed.batches([FIRST, SECOND]))


class Naive:
    """Inputs of an expert and gradients of its outputs, for one sample and one output of the model."""

    def __init__(self, module: nn.Module, layer: str, sample: Tensor, output: int) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        handle = module.get_submodule(layer).register_forward_hook(self.record)
        returned = module(sample[None].requires_grad_())
        handle.remove()
        pairs = [torch.autograd.grad(returned[0, output], y, retain_graph=True)[0] for _, y in self.calls]
        none = torch.zeros(0, 1)
        self.x = torch.cat([x for x, _ in self.calls]) if self.calls else none
        self.gradient = torch.cat(pairs) if pairs else none

    def record(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.calls.append((args[0].detach(), output))


def test_moments_and_hessian_of_experts(seed: int) -> None:
    model, listed, batches = found(seed)
    assert [len(batch) for batch in batches] == [1] * 5
    names = [layer.name for layer in listed.layers]
    assert set(EXPERTS) <= set(names)
    captured = capture(model, listed.layers, batches, rows=1000, moments=True, alone=listed.alone)
    gradients = {layer.name: OuterProducts(layer.out_features, "cpu") for layer in listed.layers}
    hessian = label_free_hessian(model, listed.layers, batches, mode="exact", gradients=gradients, alone=listed.alone)
    samples, outputs = torch.cat([FIRST, SECOND]), 3
    for name in EXPERTS:
        size = listed[name]
        inputs = torch.zeros(FOLDS, size.in_features, size.in_features)
        squares = torch.zeros(FOLDS, size.out_features, size.out_features)
        tokens, kept = [0] * FOLDS, []
        expected = torch.zeros(size.out_features, size.in_features)
        for index, sample in enumerate(samples):
            for output in range(outputs):
                one = Naive(model.module, name, sample, output)
                if not len(one.x):
                    continue
                expected += (one.gradient.T @ one.x).square() / len(samples)
                squares[index % FOLDS] += one.gradient.T @ one.gradient
                if output == 0:
                    inputs[index % FOLDS] += one.x.T @ one.x
                    tokens[index % FOLDS] += len(one.x)
                    kept += [(index, token) for token in range(len(one.x))]
        assert sum(tokens) > 0
        count = torch.tensor(tokens)[:, None, None].clamp(min=1)
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(captured.inputs[name].means().float(), inputs / count, **close)
        torch.testing.assert_close(gradients[name].means().float(), squares / (count * outputs), **close)
        torch.testing.assert_close(hessian[name], expected, **close)
        assert captured.inputs[name].counts == tokens
        own = captured.samples[name]
        assert sorted(zip(own.sample.tolist(), own.token.tolist(), strict=True)) == kept


def test_a_layer_that_no_batch_reaches_has_no_rows() -> None:
    model, listed, batches = found()
    captured = capture(model, listed.layers, batches[:3], moments=True, alone=listed.alone)
    assert captured.samples["up.1"].x.shape == (0, 4)
    assert captured.samples["down.1"].x.shape == (0, 6)
    assert captured.inputs["up.1"].counts == [0, 0]
    assert captured.inputs["up.0"].counts != [0, 0]


def test_importance_of_an_experts_tokens_has_mean_one_over_the_samples_that_it_has() -> None:
    model, listed, batches = found()
    weights = token_importance(model, listed.layers, listed.blocks, batches, alone=listed.alone)
    captured = capture(model, listed.layers, batches, moments=True, importance=weights, alone=listed.alone)
    for name in EXPERTS:
        own = [batch[name].flatten() for batch in weights if name in batch]
        assert 0 < len(own) < len(batches) or name.endswith(".0")
        assert float(torch.cat(own).mean()) == pytest.approx(1, rel=1e-5)
        assert sum(captured.inputs[name].weights) == pytest.approx(float(torch.cat(own).sum()), rel=1e-4)


def test_a_mask_of_tokens_is_none_of_an_experts_inputs() -> None:
    """As many tokens of an expert as a sample has: the mask is that of the tokens, whose order the expert changes."""
    model, listed, batches = found()
    model.token_mask = lambda batch: torch.tensor([[True, True, True, False]]).expand(len(batch), -1)
    batches = [tokens_of([0, 0, 0, 0]), *batches]
    for alone, count in ((listed.alone, 4), ((), 3)):
        captured = capture(model, listed.layers, batches[:1], moments=True, alone=alone)
        assert sum(captured.inputs["up.0"].counts) == count
        assert len(captured.samples["up.0"].x) == count
        assert sum(captured.inputs["first"].counts) == 3


def test_paired_moments_of_an_expert_are_those_of_the_compressed_model() -> None:
    model, listed, batches = found()
    paired = PairedForward(model, listed.blocks, batches, alone=listed.alone)
    first = paired.compressed.get_submodule("first")
    with torch.no_grad():
        first.weight.add_(0.1)
    for name in ("up.1", "down.2"):
        seen: list[Tensor] = []
        layer = paired.compressed.get_submodule(name)
        handle = layer.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                paired.compressed(batch)
        handle.remove()
        x = torch.cat(seen).double()
        moments = paired.moments(listed[name])
        torch.testing.assert_close(moments.compressed, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        assert moments.tokens == len(x)
        assert not moments.drift.any()
        assert not moments.drift_cross.any()

"""Error feedback and block reconstruction on small nets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mlorq.errors import ModelError
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.forms.base import Candidate
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel
from mlorq.models.batches import fold_batches, split_batches, take_samples
from mlorq.models.layer_list import Layer
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.rounding.block import ReconstructionSettings
from mlorq.rounding.error_feedback import corrected_weight
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments, PairedForward
from mlorq.rounding.reconstruction import reconstruct
from tests.layers import hessian_fit, round_layer
from tests.nets import SkipNet, TokenNet, images, token_net


def moments(x: Tensor, y: Tensor, folds: bool = True) -> InputMoments:
    """Of inputs x of the float and y of the compressed model, ``(tokens, width)``."""
    x, y = x.double(), y.double()
    drift, count = x - y, len(x)
    parts = tuple(moments(x[fold::2], y[fold::2], False) for fold in range(2)) if folds else ()
    products = (y.T @ y / count, drift.T @ y / count, drift.T @ drift / count)
    return InputMoments(*products, count, y.mean(0), drift.mean(0), parts)


def drifting(seed: int, tokens: int = 600, width: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs of the compressed model that are a linear function of the float ones, shifted, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    change = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator) / width**0.5
    return x, x @ change + 0.3 + 0.05 * torch.randn(tokens, width, generator=generator)


def fitted(seed: int, rows: int = 10, columns: int = 16) -> HessianFit:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 7))
    return hessian_fit(weight)


def test_corrected_weight_is_the_ridge_regression_on_the_change(seed: int) -> None:
    x, y = drifting(seed)
    fit, found = fitted(seed), moments(x, y)
    corrected = corrected_weight(fit.weight, found)
    assert output_error(fit.weight, corrected, found) < 0.5 * output_error(fit.weight, fit.weight, found)
    # Against the naive solution for the same λ, one of those that are tried.
    level = float(found.compressed.diagonal().mean())
    targets = (x.double() @ fit.weight.double().T - y.double() @ fit.weight.double().T) / 600
    distances = []
    for ridge in (1e-3, 1e-2, 1e-1, 1.0):
        normal = found.compressed + ridge * level * torch.eye(16)
        naive = fit.weight.double() + torch.linalg.solve(normal, y.double().T @ targets).T
        distances.append(float((naive - corrected).abs().max()))
    assert min(distances) < 1e-6


def test_nothing_is_corrected_where_nothing_has_changed(seed: int) -> None:
    x, _ = drifting(seed)
    fit = fitted(seed)
    assert torch.equal(corrected_weight(fit.weight, moments(x, x)), fit.weight.double())


@pytest.mark.parametrize(
    "candidate",
    [Candidate("Q", bits=3), Candidate("LR", bits_a=4, bits_b=4, rank=9), Candidate("QLR", 2, 4, 4, 3)],
    ids=lambda candidate: candidate.candidate_id,
)
def test_closed_form_is_better_than_gptq_than_nearest(candidate: Candidate, seed: int) -> None:
    x, y = drifting(seed)
    fit, found = fitted(seed), moments(x, y)
    bias = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    wanted = x.double() @ fit.weight.double().T + bias.double()

    def error(layer: CompressedLayer) -> float:
        own = bias if layer.bias is None else layer.bias
        return float((y.double() @ layer.dense().double().T + own.double() - wanted).square().mean())

    errors = {
        method: error(round_layer(method, fit, candidate, found, bias).layer)
        for method in ("nearest", "gptq", "closed_form")
    }
    assert errors["closed_form"] < errors["gptq"] < errors["nearest"]


def test_lra_started_from_the_closed_form_is_never_worse_than_it(seed: int) -> None:
    x, y = drifting(seed)
    fit, found = fitted(seed), moments(x, y)
    candidate = Candidate("Q", bits=3)
    gptq = round_layer("gptq", fit, candidate, found)
    learned = round_layer("lra", fit, candidate, found, iterations=50, start="closed_form")
    assert learned.error_before == pytest.approx(gptq.error_after, rel=1e-5)
    assert learned.error_after <= learned.error_before


# -- whole blocks -----------------------------------------------------------------------------------------------------


def rounded_block(
    model: FloatModel, batches: Sequence[Tensor], block: int, bits: int = 2
) -> tuple[PairedForward, list[tuple[Layer, CompressedLayer]]]:
    """A pair in which all layers up to the end of a block are rounded in closed form, and that block's layers."""
    listed = find_layers(model, batches[0])
    paired = PairedForward(model, listed.blocks, batches)
    inside = []
    for layer in listed.layers:
        if layer.block > block or layer.name == "head":
            continue
        weight = weight_matrix(model.module.get_submodule(layer.name))
        bias = model.module.get_submodule(layer.name).bias
        candidate, moments = Candidate("Q", bits=bits), paired.moments(layer)
        result = round_layer("closed_form", hessian_fit(weight), candidate, moments, bias, layer=layer.name)
        paired.set(layer, result.layer)
        if layer.name.startswith(f"blocks.{block}."):
            inside.append((layer, result.layer))
    return paired, inside


def block_error(model: FloatModel, paired: PairedForward, batches: Sequence[Tensor], block: int) -> float:
    """Error of a block's output, with hooks on both models."""
    error = 0.0
    for batch in batches:
        outputs = []
        for module in (model.module, paired.compressed):
            handle = module.get_submodule(f"blocks.{block}").register_forward_hook(
                lambda _, __, output, kept=outputs: kept.append(output)
            )
            with torch.no_grad():
                module(batch)
            handle.remove()
        error += float((outputs[0] - outputs[1]).double().square().sum())
    return error


# Blocks that are no chain have no rest of the model that could follow one of them.
@pytest.mark.parametrize(("kind", "loss"), [(TokenNet, "block"), (TokenNet, "output"), (SkipNet, "block")])
def test_reconstruction_lowers_the_error_of_the_block(kind: type[TokenNet], loss: str, seed: int) -> None:
    model = token_net(seed, kind)
    batches = [images(8, seed * 100 + index) for index in range(10)]
    paired, inside = rounded_block(model, batches, 1)
    before = block_error(model, paired, batches, 1)
    float_weights = {name: value.clone() for name, value in model.module.state_dict().items()}
    settings = ReconstructionSettings(iterations=120, loss=loss)  # type: ignore[arg-type]
    result = reconstruct(paired, 1, inside, settings, seed=seed)
    assert result.loss_after <= result.loss_before
    assert result.iterations == 120
    assert all(torch.equal(value, float_weights[name]) for name, value in model.module.state_dict().items())
    assert block_error(model, paired, batches, 1) == pytest.approx(before, rel=1e-6)  # nothing is set by itself
    again = reconstruct(paired, 1, inside, settings, seed=seed)
    for one, other in zip(result.layers, again.layers, strict=True):
        assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
    for (layer, _), compressed in zip(inside, result.layers, strict=True):
        paired.set(layer, compressed)
    if loss == "block":
        assert block_error(model, paired, batches, 1) < before


def test_a_loss_at_the_output_needs_a_chain() -> None:
    model = token_net(0, SkipNet)
    batches = [images(8, index) for index in range(3)]
    paired, inside = rounded_block(model, batches, 1)
    with pytest.raises(ModelError, match="blocks are a chain"):
        reconstruct(paired, 1, inside, ReconstructionSettings(iterations=2, loss="output"))


def test_what_is_no_better_on_held_out_samples_is_not_kept(seed: int) -> None:
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(5)]
    paired, inside = rounded_block(model, batches, 0, bits=8)
    settings = ReconstructionSettings(iterations=8, code_rate=100.0, scale_rate=1.0, bias_rate=10.0)
    result = reconstruct(paired, 0, inside, settings)
    assert result.loss_after == result.loss_before
    assert result.layers == [compressed for _, compressed in inside]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_batches_are_split_and_folded_by_samples() -> None:
    batches = [{"x": torch.arange(5), "one": torch.tensor(3.0)}, {"x": torch.arange(5, 8), "one": torch.tensor(3.0)}]
    assert [batch["x"].tolist() for batch in split_batches(batches, 2)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert [batch["x"].tolist() for batch in fold_batches(batches, 1)] == [[1, 3], [5, 7]]
    assert [batch["x"].tolist() for batch in fold_batches(batches, 0)] == [[0, 2, 4], [6]]
    assert take_samples((torch.arange(4), torch.ones(2)), slice(1, 3))[0].tolist() == [1, 2]
    assert len(fold_batches([torch.arange(1), torch.arange(1)], 1)) == 1

"""ERQ, BRECQ and QDrop against straightforward implementations of their own on small layers and nets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mlorq.codecs.affine import RowQuantizer
from mlorq.fitting.scale_search import search_quantizer
from mlorq.forms.base import FORMS, Candidate
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.rounding import METHODS
from mlorq.rounding.brecq import SoftSettings
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import PairedForward
from mlorq.rounding.reconstruction import reconstruct_softly
from mlorq.rounding.ridge_rounding import FLIPS, TOKEN_RIDGE, WEIGHT_RIDGE, corrected_fit, flipped, round_in_halves
from mlorq.rounding.soft_rounding import Regulariser, SoftLayer, SoftMatrix, set_hard
from mlorq.rounding.trainable import _batch_order
from tests.layers import hessian_fit, round_layer
from tests.nets import images, token_net
from tests.rounding.test_reconstruction import block_error, drifting, fitted, moments

PERCENTILES = [0.97, 0.99, 1.0]


def covariance(size: int, seed: int) -> Tensor:
    x = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return (x @ mix).T @ (x @ mix) / len(x)


# -- ERQ --------------------------------------------------------------------------------------------------------------


def naive_flips(values: Tensor, sigma: Tensor, quantizer: RowQuantizer) -> Tensor:
    """Row by row, every flip's error computed in full."""
    codes = quantizer.quantize(values.float())
    for row in range(len(values)):
        scale, zero = quantizer.scale[row].double(), quantizer.zero_point[row].double()

        def error(code: Tensor, row: int = row, scale: Tensor = scale, zero: Tensor = zero) -> float:
            delta = (code.double() - zero) * scale - values[row]
            return float(delta @ sigma @ delta)

        for _ in range(FLIPS):
            best, least = None, error(codes[row])
            for column in range(values.shape[1]):
                above = float((codes[row, column].double() - zero) * scale) > float(values[row, column])
                other = codes[row].clone()
                other[column] += -1 if above else 1
                if 0 <= other[column] < 2**quantizer.bits and error(other) < least - 1e-12:
                    best, least = other, error(other)
            if best is None:
                break
            codes[row] = best
    return codes


def test_flips_are_the_best_single_ones(seed):
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma = covariance(9, seed)
    quantizer = search_quantizer(values.float(), 3, PERCENTILES)
    found, naive = flipped(values, sigma, quantizer), naive_flips(values, sigma, quantizer)
    assert (found != naive).float().mean() < 0.06, "ties alone"
    errors = [
        ((quantizer.dequantize(codes) - values) @ sigma * (quantizer.dequantize(codes) - values)).sum()
        for codes in (found, naive, quantizer.quantize(values.float()))
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-2, atol=0)
    assert errors[0] < errors[2]


def test_halves_are_rounded_and_the_rest_makes_up_for_them(seed):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    sigma = covariance(24, seed)
    quantizer = search_quantizer(weight, 3, PERCENTILES)
    found = round_in_halves(weight, sigma, quantizer)
    # By rows, with one explicit least-squares problem a half: 12 columns, then 6, then the last 6.
    naive = torch.empty_like(found)
    for row in range(5):
        own = RowQuantizer(quantizer.scale[row : row + 1], quantizer.zero_point[row : row + 1], 3)
        left = weight[row].double().clone()
        for start, stop in ((0, 12), (12, 18), (18, 24)):
            naive[row, start:stop] = flipped(left[None, start:stop], sigma[start:stop, start:stop], own)[0]
            delta = (own.dequantize(naive[None, row, start:stop]).double() - left[start:stop])[0]
            if stop < 24:
                rest = sigma[stop:, stop:]
                normal = rest + WEIGHT_RIDGE * rest.diagonal().mean() * torch.eye(24 - stop, dtype=torch.float64)
                left[stop:] += torch.linalg.solve(normal, -sigma[stop:, start:stop] @ delta)
    assert (found != naive).float().mean() < 0.02
    error = (quantizer.dequantize(found) - weight).double()
    nearest = (quantizer.round_trip(weight) - weight).double()
    assert (error @ sigma * error).sum() < 0.8 * (nearest @ sigma * nearest).sum()


@pytest.mark.parametrize("candidate", [Candidate("Q", bits=3), Candidate("LR", bits_a=4, bits_b=4, rank=8)])
def test_each_regression_lowers_the_error_of_the_layer(candidate, seed):
    x, y = drifting(seed)
    fit, found = fitted(seed), moments(x, y)
    moved = corrected_fit(fit, found)
    normal = y.double().T @ y.double() + TOKEN_RIDGE * torch.eye(16, dtype=torch.float64)
    targets = (x - y).double() @ fit.weight.double().T
    naive = fit.weight.double() + torch.linalg.solve(normal, y.double().T @ targets).T
    torch.testing.assert_close(moved.weight.double(), naive, atol=1e-4, rtol=1e-3)
    assert output_error(fit.weight, moved.weight, found) < output_error(fit.weight, fit.weight, found)
    result = round_layer("erq", fit, candidate, found)
    assert result.error_after < result.error_before
    assert result.error_after == pytest.approx(output_error(fit.weight, result.layer.dense(), found), rel=1e-6)


@pytest.mark.parametrize("count", [10, 18, 24])  # of 16 inputs
def test_the_noise_of_few_samples_is_not_fitted(count, seed):
    x = 10 * drifting(seed, tokens=400)[0]
    y = x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1000))
    fit = fitted(seed)
    few, others = replace(moments(x[:count], y[:count]), has_tokens=False), moments(x[count:], y[count:])
    moved = corrected_fit(fit, few)
    assert output_error(fit.weight, moved.weight, others) < 1.5 * output_error(fit.weight, fit.weight, others)
    assert output_error(fit.weight, moved.weight, few) < output_error(fit.weight, fit.weight, few)


def test_lra_starts_from_the_moved_weights(seed):
    x, y = drifting(seed)
    fit, found = fitted(seed), moments(x, y)
    candidate = Candidate("LR", bits_a=4, bits_b=4, rank=8)
    errors = [
        round_layer("lra", fit, candidate, found, iterations=200, start=start).error_after
        for start in ("nearest", "erq")
    ]
    assert errors[1] < errors[0]


# -- BRECQ and QDrop --------------------------------------------------------------------------------------------------


def test_soft_rounding_starts_at_the_value_and_ends_at_codes(seed):
    values = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    quantizer = search_quantizer(values, 3, [1.0])
    soft = SoftMatrix(values, quantizer)
    codes = quantizer.quantize(values)
    inside = (codes > 0) & (codes < 7)
    near = 2e-3 * float(quantizer.scale.max())
    torch.testing.assert_close(soft.values().detach()[inside], values[inside], atol=near, rtol=0)
    assert torch.equal(soft.result().codes.float(), codes)
    soft.hard = True
    assert torch.equal(soft.values(), quantizer.round_trip(values))


def rounded_to_nearest(model, batches, block: int, bits: int = 3):
    """A pair whose layers up to a block's are rounded to nearest, the block's layers, and their float matrices."""
    listed = find_layers(model, batches[0])
    paired = PairedForward(model, listed.blocks, batches)
    inside, parts = [], {}
    for layer in listed.layers:
        if layer.block > block:
            continue
        weight = weight_matrix(model.module.get_submodule(layer.name))
        fit, candidate = hessian_fit(weight), Candidate("Q", bits=bits)
        result = round_layer("nearest", fit, candidate, layer=layer.name)
        paired.set(layer, result.layer)
        if layer.name.startswith(f"blocks.{block}."):
            inside.append((layer, result.layer))
            own = FORMS[candidate.form].fit(fit, candidate)
            parts[layer.name] = {name: (part.values, part.quantizer) for name, part in own.items()}
    return paired, inside, parts


@pytest.mark.parametrize("method", ["brecq", "qdrop"])
def test_blocks_get_better_and_codes_stay_beside_their_values(method, seed):
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(10)]
    paired, inside, parts = rounded_to_nearest(model, batches, 1)
    before = block_error(model, paired, batches, 1)
    settings = SoftSettings(iterations=150, soft_rate=0.05)
    result = METHODS[method].blocks.reconstruct(paired, 1, inside, settings, seed=seed, parts=parts)
    assert result.loss_after < result.loss_before
    for (layer, start), compressed in zip(inside, result.layers, strict=True):
        values, quantizer = parts[layer.name]["weight"]
        floor = (values / quantizer.scale.unsqueeze(1)).floor() + quantizer.zero_point.unsqueeze(1)
        codes = compressed.matrices["weight"].codes.float()
        assert ((codes == floor.clamp(0, 7)) | (codes == (floor + 1).clamp(0, 7))).all()
        assert torch.equal(compressed.matrices["weight"].scale, start.matrices["weight"].scale)
        paired.set(layer, compressed)
    assert block_error(model, paired, batches, 1) < before


def test_brecq_is_adaround_on_a_block_with_squared_gradients(seed):
    """The same steps written out with autograd on plain tensors."""
    model = token_net(seed)
    batches = [images(8, seed * 100 + index) for index in range(6)]
    paired, inside, parts = rounded_to_nearest(model, batches, 1)
    steps, rate, weight = 30, 0.05, 0.01
    settings = SoftSettings(iterations=steps, soft_rate=rate, soft_weight=weight)
    calls = paired.block_calls(1, fisher=True, seed=seed)
    assert all(call.weights.shape == call.target.shape for call in calls)
    trained = calls[1:5]  # every fifth batch is held out
    alphas, bases, scales, zeros = {}, {}, {}, {}
    for layer, _ in inside:
        values, quantizer = parts[layer.name]["weight"]
        scales[layer.name], zeros[layer.name] = quantizer.scale.unsqueeze(1), quantizer.zero_point.unsqueeze(1)
        bases[layer.name] = (values / scales[layer.name]).floor()
        fraction = (values / scales[layer.name] - bases[layer.name]).clamp(1e-3, 1 - 1e-3)
        alphas[layer.name] = torch.log((fraction + 0.1) / (1.1 - fraction)).requires_grad_(True)
    optimiser = torch.optim.Adam(list(alphas.values()), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    block = paired.compressed.get_submodule("blocks.1")
    prefix = "blocks.1."
    for step, index in enumerate(_batch_order(4, steps, seed)):
        call = trained[index]
        h = {name: (alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1) for name, alpha in alphas.items()}
        weights = {
            f"{name.removeprefix(prefix)}.weight": ((bases[name] + h[name] + zeros[name]).clamp(0, 7) - zeros[name])
            * scales[name]
            for name in alphas
        }
        output = torch.func.functional_call(block, weights, call.args, call.kwargs)
        loss = ((output - call.target).square() * call.weights).sum() / (call.target.square() * call.weights).sum()
        share = max(0.0, (step - 0.2 * steps) / (0.8 * steps))
        if share:
            beta = 20 - 18 * share
            loss = loss + weight * sum((1 - (2 * value - 1).abs().pow(beta)).mean() for value in h.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    layers = [SoftLayer(paired.compressed, layer, compressed, parts[layer.name]) for layer, compressed in inside]
    set_hard(layers, True)
    result = reconstruct_softly(paired, 1, inside, settings, parts, seed=seed, fisher=True)
    if result.loss_after < result.loss_before:
        for compressed in result.layers:
            name = compressed.layer
            naive = (bases[name] + (alphas[name] >= 0) + zeros[name]).clamp(0, 7)
            assert (compressed.matrices["weight"].codes.float() != naive).float().mean() < 0.05
    assert float(Regulariser(layers, 10, 1.0)()) == 0, "not in the warm-up"


def test_squared_gradients_are_those_of_the_output(seed):
    model = token_net(seed)
    batch = images(4, seed)
    listed = find_layers(model, batch)
    paired = PairedForward(model, listed.blocks, [batch])
    (call,) = paired.block_calls(0, fisher=True, seed=seed)
    kept = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        entry = output.detach().requires_grad_(True)
        kept.append(entry)
        return entry

    handle = model.module.get_submodule("blocks.0").register_forward_hook(keep)
    output = model.outputs(model.module, batch)
    handle.remove()
    vector = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad((vector * output).sum(), kept[0])
    expected = gradient.square() / gradient.square().mean()
    torch.testing.assert_close(call.weights, expected, rtol=1e-4, atol=1e-5)


def test_moments_know_whether_there_are_tokens(seed):
    model = token_net(seed)
    batch = images(4, seed)
    listed = find_layers(model, batch)
    paired = PairedForward(model, listed.blocks, [batch])
    found = {layer.name: paired.moments(layer).has_tokens for layer in listed.layers}
    assert set(found.values()) <= {True, False}
    tokens = {layer.name: layer.macs // layer.params > 1 for layer in listed.layers}
    assert found == tokens


def test_a_block_without_soft_codes_has_no_penalty() -> None:
    regulariser = Regulariser([], 10, 1.0)
    assert [regulariser().item() for _ in range(10)] == [0.0] * 10

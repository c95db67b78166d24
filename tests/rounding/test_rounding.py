"""Rounding methods: closed forms against tokens, and learning that does what it is for."""

from __future__ import annotations

import pytest
import torch

from mlorq.codecs.affine import Rounded
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.forms.base import FORMS, Candidate
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.rounding.adaptive_rounding import _Objective, _SoftMatrix
from mlorq.rounding.output_error import output_error
from mlorq.rounding.paired_forward import InputMoments, PairedForward
from mlorq.rounding.rectified_sigmoid import DECAYS, EPSILON, radam_scalars
from tests.layers import dense, hessian_fit, round_layer, stored
from tests.nets import images, token_net

CANDIDATES = [
    Candidate("Q", bits=2),
    Candidate("Q", bits=4),
    Candidate("LR", bits_a=4, bits_b=4, rank=12),
    Candidate("QLR", bits=2, bits_a=4, bits_b=4, rank=5),
]


def correlated_tokens(tokens: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x of a layer in the float model, and x̃, a little off, in the compressed one."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(tokens, width, generator=generator) @ mixing
    return x, x + 0.05 * torch.randn(tokens, width, generator=generator)


def moments_of(x: torch.Tensor, y: torch.Tensor) -> InputMoments:
    drift, y = (x - y).double(), y.double()
    return InputMoments(y.T @ y / len(x), drift.T @ y / len(x), drift.T @ drift / len(x), len(x))


def fitted(seed: int, rows: int = 12, columns: int = 20, device: str = "cpu") -> HessianFit:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    hessian = torch.rand(rows, columns, generator=generator)
    return hessian_fit(weight.to(device), hessian.to(device))


def rounded_parts(fit: HessianFit, candidate: Candidate) -> dict[str, Rounded]:
    """The candidate's matrices, rounded to nearest."""
    return FORMS[candidate.form].fit(fit, candidate)


def test_error_in_closed_form_is_the_error_over_tokens(seed):
    x, y = correlated_tokens(500, 20, seed)
    fit = fitted(seed)
    rounded = dense(fit, Candidate("Q", bits=3))
    expected = float((x.double() @ fit.weight.double().T - y.double() @ rounded.double().T).square().mean())
    assert output_error(fit.weight, rounded, moments_of(x, y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_gradients_are_those_of_the_loss(candidate, seed):
    x, y = correlated_tokens(300, 20, seed)
    fit = fitted(seed)
    parts = rounded_parts(fit, candidate)
    matrices = {name: _SoftMatrix.start(part.values, part.quantizer) for name, part in parts.items()}
    for matrix in matrices.values():
        matrix.alpha.requires_grad_(True)
    form, beta, weight = FORMS[candidate.form], 7.0, 0.3
    values, regulariser = {}, torch.zeros(())
    for name, matrix in matrices.items():
        h = (matrix.alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        codes = (matrix.base + h).clamp(0, 2**matrix.quantizer.bits - 1)
        values[name] = matrix.quantizer.dequantize(codes)
        regulariser = regulariser + (1 - (2 * h - 1).abs().pow(beta)).mean()
    loss = (x @ fit.weight.T - y @ form.combine(values).T).square().mean() + weight * regulariser
    expected = torch.autograd.grad(loss, [matrix.alpha for matrix in matrices.values()])
    with torch.no_grad():
        soft = {name: matrix.soft() for name, matrix in matrices.items()}
        objective = _Objective(fit.weight, moments_of(x, y), form)
        gradients = objective.gradients({name: value for name, (value, _, _) in soft.items()})
        for (name, matrix), wanted in zip(matrices.items(), expected, strict=True):
            _, h, slope = soft[name]
            found = matrix.alpha_gradient(gradients[name], h, slope, beta, weight)
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_soft_rounding_starts_at_the_float_value(candidate, seed):
    for _, quantizer, values in rounded_parts(fitted(seed), candidate).values():
        soft, _, _ = _SoftMatrix.start(values, quantizer).soft()
        inside = (soft - quantizer.round_trip(values)).abs() <= quantizer.scale.unsqueeze(1)
        clipped = (quantizer.quantize(values) == 0) | (quantizer.quantize(values) == 2**quantizer.bits - 1)
        assert (inside | clipped).all()
        torch.testing.assert_close(soft[~clipped], values[~clipped], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("candidate", CANDIDATES[:3])  # of the published forms; QLR keeps its start where nothing helps
def test_lra_lowers_the_error_on_correlated_inputs(candidate, seed, device):
    x, y = correlated_tokens(400, 20, seed)
    fit = fitted(seed, device=device)
    moments = InputMoments(
        *(getattr(moments_of(x, y), n).to(device) for n in ("compressed", "drift_cross", "drift")), 400
    )
    nearest = round_layer("nearest", fit, candidate, moments)
    learned = round_layer("lra", fit, candidate, moments, iterations=300)
    assert learned.error_before == pytest.approx(nearest.error_after, rel=1e-6)
    assert learned.error_after < 0.8 * learned.error_before
    found = output_error(fit.weight, learned.layer.dense().to(device), moments)
    assert found == pytest.approx(learned.error_after, rel=1e-5)
    # Only rounding changes: codes are at most one step from the floor, scales are kept.
    for name, (_, quantizer, values) in rounded_parts(fit, candidate).items():
        stored = learned.layer.matrices[name]
        floor = (values / quantizer.scale.unsqueeze(1)).floor() + quantizer.zero_point.unsqueeze(1)
        allowed = floor.clamp(0, 2**stored.bits - 1).cpu(), (floor + 1).clamp(0, 2**stored.bits - 1).cpu()
        codes = stored.codes.float()
        assert ((codes == allowed[0]) | (codes == allowed[1])).all()


def test_scalars_of_radam_are_torchs(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    theirs, ours = values.clone(), values.clone()
    optimiser = torch.optim.RAdam([theirs], lr=0.03)
    mean, square = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 40):
        gradient = torch.randn(7, generator=generator, dtype=torch.float64)
        theirs.grad = gradient
        optimiser.step()
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * gradient
        square = DECAYS[1] * square + (1 - DECAYS[1]) * gradient.square()
        rate, rectified = radam_scalars(step, 0.03)
        ours -= rate * mean * (rectified / (square.sqrt() + EPSILON) if rectified else 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert rectified > 0


def test_lra_keeps_nearest_rounding_where_learning_does_not_help(seed):
    fit = fitted(seed)
    moments = InputMoments(torch.eye(20).double(), torch.zeros(20, 20).double(), torch.zeros(20, 20).double(), 1)
    result = round_layer("lra", fit, Candidate("Q", bits=4), moments, iterations=2, learning_rate=50.0)
    assert result.error_after <= result.error_before


def test_lra_stops_where_nothing_is_left_to_learn(seed):
    fit = fitted(seed)
    moments = InputMoments(*(torch.zeros(20, 20).double() for _ in range(3)), tokens=1)
    result = round_layer("lra", fit, Candidate("Q", bits=4), moments)
    assert result.iterations == 0


def test_paired_forward_sees_the_inputs_of_both_models(seed):
    model = token_net(seed)
    batches = [images(3, seed), images(2, seed + 1)]
    found = find_layers(model, batches[0])
    paired = PairedForward(model, found.blocks, batches)
    for layer in found.layers:
        inputs: dict[str, torch.Tensor] = {}
        for key, module in (("float", model.module), ("compressed", paired.compressed)):
            rows = []
            child = module.get_submodule(layer.name)

            def record(module, args, rows=rows):
                x = args[0]
                if isinstance(module, torch.nn.Conv2d):
                    x = torch.nn.functional.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)
                rows.append(x.reshape(-1, x.shape[-1]))

            handle = child.register_forward_pre_hook(record)
            with torch.no_grad():
                for batch in batches:
                    module(batch)
            handle.remove()
            inputs[key] = torch.cat(rows)
        expected = moments_of(inputs["float"], inputs["compressed"])
        moments = paired.moments(layer)
        assert moments.tokens == expected.tokens
        for name in ("compressed", "drift_cross", "drift"):
            torch.testing.assert_close(getattr(moments, name), getattr(expected, name), rtol=1e-4, atol=1e-6)
        fit = hessian_fit(weight_matrix(model.module.get_submodule(layer.name)))
        paired.set(layer, stored(fit, Candidate("Q", bits=3), layer.name))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 0.0])
def test_inputs_that_hardly_vary_are_rounded_about_their_means(candidate, spread, seed):
    """Sums of float32 products leave less than their own error of a variance that small."""
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 + torch.rand(20, generator=generator) + spread * torch.randn(300, 20, generator=generator)
    y = x + spread * torch.randn(300, 20, generator=generator)
    fit = fitted(seed)

    def summed(part: slice, folds: tuple[InputMoments, ...] = ()) -> InputMoments:
        own, drift = y[part], x[part] - y[part]
        products = (own.T @ own, drift.T @ own, drift.T @ drift)
        count = len(own)
        sums = [(product / count).double() for product in products]
        return InputMoments(*sums, count, own.double().mean(0), drift.double().mean(0), folds)

    moments = summed(slice(None), (summed(slice(0, None, 2)), summed(slice(1, None, 2))))
    bias = torch.zeros(12)
    result = round_layer("closed_form", fit, candidate, moments, bias)
    found = y @ result.layer.dense().T + result.layer.bias
    wanted = x @ fit.weight.T
    assert float((found - wanted).square().mean()) < 1e-3 * float(wanted.square().mean()) + 10 * spread**2

"""Losses of APHQ-ViT, FIMA-Q, LS-ViT and GLF-Q against explicit matrices and hooks on small nets."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mlorq.calibration.output_divergence import TEMPERATURE, divergence, divergence_gradient, perturbation_hessian
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel
from mlorq.rounding import METHODS
from mlorq.rounding.block_losses import (
    BlockLoss,
    FeatureLoss,
    LeastSquaresLoss,
    LowRankForm,
    LowRankLoss,
    PerturbationLoss,
    least_squares_form,
    least_squares_sums,
)
from mlorq.rounding.paired_forward import PairedForward
from tests.nets import SkipNet, images, token_net
from tests.rounding.test_published_methods import rounded_to_nearest

BLOCK = "blocks.1"
LATER = ["aphq", "fimaq", "lsvit", "glfq"]


def naive_divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    p, q = (reference / TEMPERATURE).softmax(1), (outputs / TEMPERATURE).softmax(1)
    return (p * (p / q).log()).sum(1)


def outputs_with(module: nn.Module, batch: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs with another output of the block."""
    handle = module.get_submodule(BLOCK).register_forward_hook(lambda _, __, output: change(output))
    try:
        return module(batch)
    finally:
        handle.remove()


def block_output(module: nn.Module, batch: Tensor) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad():
        outputs_with(module, batch, lambda output: kept.append(output) or output)
    return kept[0]


def naive_gradient(module: nn.Module, batch: Tensor, entry: Tensor) -> Tensor:
    """``∂D/∂z`` of the float model at another output of the block."""
    entry = entry.detach().clone().requires_grad_(True)
    with torch.no_grad():
        reference = module(batch)
    with torch.enable_grad():
        total = naive_divergence(outputs_with(module, batch, lambda _: entry), reference).sum()
    return torch.autograd.grad(total, entry)[0]


def prepared(
    seed: int, loss: Callable[..., BlockLoss], token_mask: Callable[[Tensor], Tensor] | None = None
) -> tuple[FloatModel, list[Tensor], PairedForward, BlockLoss]:
    model = token_net(seed)
    if token_mask is not None:
        model = replace(model, token_mask=token_mask)
    batches = [images(samples, seed * 100 + samples) for samples in (4, 3, 5)]
    paired, _, _ = rounded_to_nearest(model, batches, 1)
    return model, batches, paired, loss(paired, 1, paired.block_calls(1, outputs=True, even=True))


# -- the divergence ---------------------------------------------------------------------------------------------------


def test_the_divergence_and_its_derivatives(seed: int) -> None:
    torch.manual_seed(seed)
    first, second = (torch.randn(6, 6) for _ in range(2))
    z, reference = torch.randn(3, 6), torch.randn(3, 6) * 20

    def finish(value: Tensor) -> Tensor:
        return 20 * torch.tanh(value @ first.to(value)) @ second.to(value)

    torch.testing.assert_close(divergence(finish(z), reference), naive_divergence(finish(z), reference))
    entry = z.double().requires_grad_(True)
    (expected,) = torch.autograd.grad(naive_divergence(finish(entry), reference.double()).sum(), entry)
    torch.testing.assert_close(divergence_gradient(z, finish, reference), expected.float(), rtol=1e-3, atol=1e-6)
    own = finish(z)
    found = perturbation_hessian(z, finish, own)
    for index in range(3):
        hessian = torch.autograd.functional.hessian(
            lambda value, index=index: naive_divergence(finish(value), own[index : index + 1].double()).sum(),
            z[index : index + 1].double(),
        ).reshape(6, 6)
        assert torch.linalg.eigvalsh(hessian).min() > -1e-6 * hessian.abs().max(), "a Fisher matrix"
        rows = hessian.sum(1).abs().float()
        torch.testing.assert_close(found[index], rows, rtol=0.05, atol=0.02 * float(rows.max()))


# -- APHQ-ViT ---------------------------------------------------------------------------------------------------------


def test_perturbation_weights_are_averages_over_samples(seed: int) -> None:
    model, batches, paired, loss = prepared(seed, PerturbationLoss)
    module = deepcopy(model.module).double()
    step, sums = 1e-4, torch.zeros(9, 8, dtype=torch.float64)
    for batch in (batch.double() for batch in batches):
        z = block_output(module, batch)
        sums += (naive_gradient(module, batch, z + step) - naive_gradient(module, batch, z - step)).abs().sum(0)
    weights = (sums / sums.mean()).float()
    assert isinstance(loss, PerturbationLoss)
    torch.testing.assert_close(loss.weights[9, 8], weights, rtol=0.02, atol=0.02)
    target, own = block_output(model.module, batches[1]), block_output(paired.compressed, batches[1])
    expected = (weights * (own - target).square()).sum() / (weights * target.square()).sum()
    torch.testing.assert_close(loss(loss.calls[1]), expected, rtol=0.02, atol=0)


# -- FIMA-Q -----------------------------------------------------------------------------------------------------------


def test_the_low_rank_form_is_that_of_explicit_matrices(seed: int) -> None:
    model, batches, paired, loss = prepared(seed, partial(LowRankLoss, rank=3, steps=6))
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[Tensor, Tensor]] = []
    first: tuple[float, float] | None = None
    for step in range(8):
        with torch.no_grad():
            weight = paired.compressed.get_submodule(f"{BLOCK}.up").weight
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
        if step % 2 == 0 and step < 6:  # a row at the start of each third of the steps, and no more than three
            gradients, sizes = [], []
            for batch in batches:
                own = block_output(paired.compressed, batch)
                gradients.append(naive_gradient(model.module, batch, own).abs())
                sizes.append((own - block_output(model.module, batch)).abs())
            rows.append((torch.cat(gradients).mean(0).flatten(), torch.cat(sizes).mean(0).flatten()))
            first = None
        gradient, size = (torch.stack(part).double() for part in zip(*rows, strict=True))
        fisher = gradient.T @ torch.linalg.inv(size @ size.T) @ gradient  # (entries, entries)
        index = step % 3
        delta = block_output(paired.compressed, batches[index]) - block_output(model.module, batches[index])
        delta = delta.abs().flatten(1).double()
        low = torch.stack([row @ fisher @ row for row in delta]).mean()
        diagonal = torch.stack([row @ torch.diag(gradient.mean(0)) @ row for row in delta]).mean()
        first = first or (float(low), float(diagonal))
        expected = float(low) / first[0] + float(diagonal) / first[1]
        assert float(loss(loss.calls[index])) == pytest.approx(expected, rel=0.03)
    assert len(rows) == 3
    found = torch.cat([naive_divergence(paired.compressed(batch), model.module(batch)) for batch in batches])
    # Block 2 of the compressed copy is float: the copy's outputs are those of the float model continued from block 1.
    assert loss.of_all(loss.calls) == pytest.approx(float(found.mean()), rel=0.05, abs=1e-8)


def test_the_low_rank_form_of_rows_that_are_alike_is_positive(seed: int) -> None:
    """Rows that a few steps of training have hardly changed: their inner products have a large inverse."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(2, 400, generator=generator, dtype=torch.float64)
    gradients, sizes = (row + 1e-5 * torch.rand(9, 400, generator=generator, dtype=torch.float64) for row in first)
    form = LowRankForm(gradients.float(), sizes.float())
    delta = torch.randn(3, 400, generator=generator)
    found, _ = form.terms(delta)
    projected = delta.abs().double() @ gradients.float().double().T
    wide = sizes.float().double()
    expected = (projected * torch.linalg.solve(wide @ wide.T, projected.T).T).sum(1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    assert float(found) > 0


# -- LS-ViT -----------------------------------------------------------------------------------------------------------


def test_least_squares_are_those_of_a_solver(seed: int) -> None:
    torch.manual_seed(seed)
    delta, curvature = torch.randn(30, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    gradient = delta @ (curvature @ curvature.T)
    diagonal, vector = least_squares_form(*least_squares_sums(delta, gradient))
    for entry in range(5):
        solved = torch.linalg.lstsq(delta[:, entry : entry + 1], gradient[:, entry : entry + 1]).solution
        assert float(diagonal[entry]) == pytest.approx(max(0.0, float(solved)), rel=1e-6, abs=1e-9)
    root = (delta * gradient).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(vector, torch.linalg.lstsq(root, gradient).solution.flatten())
    # A matrix of rank one is found exactly by samples on one side of it.
    u = torch.randn(5, dtype=torch.float64)
    delta = delta * (delta @ u).sign().unsqueeze(1)
    torch.testing.assert_close(least_squares_form(*least_squares_sums(delta, (delta @ u).unsqueeze(1) * u))[1], u)
    nothing = torch.zeros(4, 5)
    assert all(not value.any() for value in least_squares_form(*least_squares_sums(nothing, nothing)))


def test_the_least_squares_loss_is_that_of_explicit_matrices(seed: int) -> None:
    model, batches, paired, loss = prepared(seed, LeastSquaresLoss)
    outputs = [block_output(paired.compressed, batch) for batch in batches]
    deltas = [own - block_output(model.module, batch) for own, batch in zip(outputs, batches, strict=True)]
    gradients = [naive_gradient(model.module, batch, own) for own, batch in zip(outputs, batches, strict=True)]
    delta, gradient = (torch.cat(parts).flatten(1).double() for parts in (deltas, gradients))
    diagonal = ((gradient * delta).sum(0) / delta.square().sum(0)).clamp(min=0)
    inner = (delta * gradient).sum(1).clamp(min=0)
    vector = (gradient * inner.sqrt().unsqueeze(1)).sum(0) / inner.sum()
    hessian = torch.diag(diagonal) + torch.outer(vector, vector)
    values = [0.5 * torch.stack([row @ hessian @ row for row in part.flatten(1).double()]).mean() for part in deltas]
    level = torch.stack(values).mean()
    for call, expected in zip(loss.calls, values, strict=True):
        assert float(loss(call)) == pytest.approx(float(expected / level), rel=1e-2)


# -- GLF-Q ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_features_are_the_inputs_of_the_head(seed: int, weight: float) -> None:
    model, batches, paired, loss = prepared(seed, partial(FeatureLoss, local_weight=weight))
    assert float(loss(loss.calls[0])) == pytest.approx(1 + weight, rel=1e-5)

    def terms(batch: Tensor) -> tuple[float, float]:
        kept: list[Tensor] = []
        for module in (model.module, paired.compressed):
            handle = module.head.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            with torch.no_grad():
                module(batch)
            handle.remove()
        delta = block_output(paired.compressed, batch) - block_output(model.module, batch)
        return float((kept[0] - kept[1]).square().mean()), float(delta.square().mean())

    start = terms(batches[0])
    with torch.no_grad():
        paired.compressed.get_submodule(f"{BLOCK}.down").weight.mul_(0.7)
    now = terms(batches[2])
    expected = now[0] / start[0] + weight * now[1] / start[1]
    assert float(loss(loss.calls[2])) == pytest.approx(expected, rel=1e-3)


def test_without_a_head_features_are_the_outputs(seed: int) -> None:
    model, batches, paired, _ = prepared(seed, PerturbationLoss)
    call = paired.block_calls(1, even=True)[0]
    model.module.head = nn.Identity()
    paired._float._head = None
    output = next(paired.float_outputs(1))
    with torch.no_grad():
        torch.testing.assert_close(paired.penultimate(call, 2, output), model.module(batches[0]))


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [PerturbationLoss, partial(LowRankLoss, rank=1, steps=1), LeastSquaresLoss, partial(FeatureLoss, local_weight=1.0)],
)
def test_padding_does_not_count(seed: int, loss: Callable[..., BlockLoss]) -> None:
    kept = torch.arange(9) < 6
    _, _, _, made = prepared(seed, loss, token_mask=lambda batch: kept.expand(len(batch), 9))
    call = made.calls[2]
    before = float(made(call))
    moved = call.target.clone()
    moved[:, 6:] += 5
    other = replace(call, target=moved)
    if isinstance(made, FeatureLoss):
        made.features[id(other)] = made.features[id(call)]
    assert float(made(other)) == pytest.approx(before, rel=1e-5)
    moved = call.target.clone()
    moved[:, :6] += 5
    other = replace(call, target=moved)
    if isinstance(made, FeatureLoss):
        made.features[id(other)] = made.features[id(call)]
    assert float(made(other)) > 1.1 * before


@pytest.mark.parametrize("method", LATER)
def test_held_out_samples_get_better(method: str, seed: int) -> None:
    model = token_net(seed)
    batches = [images(16, seed * 100 + index) for index in range(10)]
    paired, inside, parts = rounded_to_nearest(model, batches, 1)
    blocks = METHODS[method].blocks
    assert blocks is not None
    rates = {} if method == "glfq" else {"soft_rate": 0.05}
    settings = blocks.settings(iterations=100, **rates)
    result = blocks.reconstruct(paired, 1, inside, settings, seed=seed, parts=parts)
    assert result.loss_after < result.loss_before
    if method == "glfq":
        return
    for (layer, start), compressed in zip(inside, result.layers, strict=True):
        values, quantizer = parts[layer.name]["weight"]
        floor = (values / quantizer.scale.unsqueeze(1)).floor() + quantizer.zero_point.unsqueeze(1)
        codes = compressed.matrices["weight"].codes.float()
        assert ((codes == floor.clamp(0, 7)) | (codes == (floor + 1).clamp(0, 7))).all()
        assert torch.equal(compressed.matrices["weight"].scale, start.matrices["weight"].scale)


@pytest.mark.parametrize("method", LATER)
def test_they_need_a_chain(method: str) -> None:
    model = token_net(0, SkipNet)
    paired, inside, parts = rounded_to_nearest(model, [images(4, index) for index in range(2)], 1)
    blocks = METHODS[method].blocks
    assert blocks is not None
    with pytest.raises(ModelError, match=r"blocks are a chain; use rounding\.method: block"):
        blocks.reconstruct(paired, 1, inside, blocks.settings(iterations=2), seed=0, parts=parts)

"""Probabilities normalised over rows, values by channel, ranges by token, and ranges that training moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.activations.plan import quantizers_of
from mlorq.activations.products import ProductQuantizers
from mlorq.activations.quantizers import (
    ActivationQuantizer,
    ProbabilityQuantizer,
    TokenQuantizer,
    UniformQuantizer,
    fit_heads,
    fit_log,
    fit_probabilities,
    fit_tokens,
    fit_uniform,
)
from mlorq.activations.quantizers.token import best_gain
from mlorq.activations.survey import survey
from mlorq.codecs.rotation import rotate, rotate_back
from mlorq.rounding.trainable_range import trainable_ranges
from tests import zoo
from tests.activations.test_activations import drawn, found_in

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
PERCENTILES = (0.99, 0.999, 1.0)


def tiny_vit(number: int) -> nn.Module:
    return zoo.timm_model("vit_tiny_patch16_224", VIT, number)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("step", [0.5, 0.75, 1.5])
def test_probabilities_are_their_definition(seed: int, bits: int, step: float) -> None:
    rows = (4 * drawn(6, 9, seed=seed)).softmax(-1)
    rows[0] = torch.tensor([1.0] + 8 * [0.0])
    found = ProbabilityQuantizer(bits, torch.tensor(step))(rows)
    for row, own in zip(rows.double().tolist(), found.tolist(), strict=True):
        largest, last = max(row), 2**bits - 1
        codes = [last if p == 0 else min(last, round(-math.log2(p / largest) / step)) for p in row]
        values = [0.0 if code == last else 2 ** (-step * code) for code in codes]
        assert own == pytest.approx([value / sum(values) for value in values], rel=1e-5)


def test_normalised_rows_have_less_error_than_one_scale(seed: int) -> None:
    # Rows from nearly uniform to peaked, as heads have them.
    sharpness = torch.linspace(0.1, 6, 60).unsqueeze(1)
    rows = (sharpness * drawn(60, 40, seed=seed)).softmax(-1)
    steps = (0.25, 0.5, 0.75, 1.0, 1.5)
    values = drawn(40, 16, seed=seed + 1)
    for bits in (3, 4):
        own, one = fit_probabilities(rows, bits, steps), fit_log(rows, bits, steps)
        assert torch.allclose(own(rows).sum(-1), torch.ones(60))
        assert relative(own(rows) @ values, rows @ values) < 0.3 * relative(one(rows) @ values, rows @ values)


def test_values_of_each_head_and_channel_have_their_range(seed: int) -> None:
    heads, channels = 3, 4
    size = torch.logspace(-0.5, 0.5, heads * channels).reshape(heads, 1, channels)
    values = drawn(5, heads, 30, channels, seed=seed) * size
    quantizer = fit_heads(values.movedim(1, 2).reshape(-1, heads * channels), 4, PERCENTILES, (heads, channels))
    for head in range(heads):
        for channel in range(channels):
            own = values[:, head, :, channel]
            alone = fit_uniform(own, 4, PERCENTILES)
            assert torch.allclose(quantizer(values)[:, head, :, channel], alone(own), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, -2])
def test_tokens_have_their_own_ranges(seed: int, axis: int) -> None:
    x = drawn(4, 7, 12, seed=seed) * torch.logspace(-3, 3, 7).reshape(1, 7, 1)
    x = x.movedim(-1, axis)
    quantizer = TokenQuantizer(3, torch.tensor(1.0), axis)
    found = quantizer(x)
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    levels = torch.stack([low + (high - low) * code / 7 for code in range(8)])
    nearest = (x.unsqueeze(0) - levels).abs().amin(0)
    assert torch.allclose((found - x).abs(), nearest, rtol=1e-4, atol=float(high.max()) * 1e-6)
    # The size of a token changes nothing, nor do the other tokens.
    assert torch.allclose(quantizer(8 * x), 8 * found)
    part = x[:2, :, :] if axis == -1 else x[:2]
    assert torch.equal(quantizer(part), found[:2])


def test_a_rotated_token_is_quantized_in_the_basis_of_trellis_codes(seed: int) -> None:
    x = drawn(50, 24, seed=seed)
    x[:, 3] *= 40  # an outlier channel
    rotated, plain = fit_tokens(x, 4, rotation=5), fit_tokens(x, 4)
    naive = rotate_back(TokenQuantizer(4, rotated.share)(rotate(x.double(), 5).float()).double(), 5)
    assert torch.allclose(rotated(x).double(), naive, atol=1e-4 * float(x.abs().max()))
    keys = TokenQuantizer(4, rotated.share, -2, 5)
    assert torch.allclose(keys(x.reshape(5, 10, 24).mT), rotated(x).reshape(5, 10, 24).mT, atol=1e-5)
    rest = [index for index in range(24) if index != 3]
    assert relative(rotated(x)[:, rest], x[:, rest]) < 0.5 * relative(plain(x)[:, rest], x[:, rest])


def test_gains_make_the_error_least(seed: int) -> None:
    columns, variances = drawn(9, seed=seed).exp(), (2 * drawn(9, seed=seed + 1)).exp()

    def error(gain: Tensor) -> float:
        return float((variances * gain.square()).sum() * (columns / gain.square()).sum())

    least = error(best_gain(columns, variances))
    assert least == pytest.approx(float((columns * variances).sqrt().sum().square()), rel=1e-4)
    for number in range(50):
        other = best_gain(columns, variances) * (0.3 * drawn(9, seed=seed + 2 + number)).exp()
        assert error(other) >= least * (1 - 1e-5)
    assert best_gain(torch.zeros(3), torch.ones(3)).isfinite().all()
    assert best_gain(torch.tensor([9.0, 1.0, 1e20]), torch.tensor([0.0, 1.0, 1e30])).isfinite().all()


def test_gains_lower_the_error_of_the_reader(seed: int) -> None:
    # Channels of all sizes with a mean, as outputs of GELU have them, read by small and by large columns.
    x = (drawn(400, 32, seed=seed) + 2) * drawn(32, seed=seed + 1).exp()
    weight = drawn(12, 32, seed=seed + 2) * drawn(32, seed=seed + 3).exp()
    with_gain, without = fit_tokens(x, 3, rotation=0, columns=weight.square().sum(0)), fit_tokens(x, 3, rotation=0)
    wanted = x @ weight.T
    assert relative(with_gain(x) @ weight.T, wanted) < 0.6 * relative(without(x) @ weight.T, wanted)
    gain, shift = with_gain.gain.double(), with_gain.shift.double()
    y = rotate((x.double() - shift) * gain, 0).float()
    naive = rotate_back(TokenQuantizer(3, with_gain.share)(y).double(), 0) / gain + shift
    assert torch.allclose(with_gain(x).double(), naive, atol=1e-4 * float(x.abs().max()))


def test_a_product_sums_over_tokens_with_their_own_steps(seed: int) -> None:
    """Codes of probabilities that include the steps of the values, against the product of both codes."""
    probabilities = (3 * drawn(2, 3, 5, 7, seed=seed)).softmax(-1)
    values = drawn(2, 3, 7, 4, seed=seed + 1) * torch.logspace(-2, 2, 7).reshape(7, 1)
    left, right = ProbabilityQuantizer(3, torch.tensor(0.75)), TokenQuantizer(3, torch.tensor(0.9))
    module = ProductQuantizers({"0_left": left, "0_right": right})
    module.enter(module, None)
    found = probabilities @ values
    module.leave()
    levels = 2**3 - 1
    for place in [(0, 0), (1, 2)]:
        p, v = probabilities[place].double(), values[place].double()
        low = 0.9 * v.amin(-1, keepdim=True)
        step = 0.9 * (v.amax(-1, keepdim=True) - v.amin(-1, keepdim=True)) / levels
        codes = ((v - low) / step).round().clamp(0, levels)
        carried = p * step.T
        exponents = (-(carried / carried.amax(-1, keepdim=True)).log2() / 0.75).round()
        powers = torch.where(exponents < levels, 2 ** (-0.75 * exponents), 0.0)
        product = powers @ (codes + low / step)
        naive = product * carried.sum(-1, keepdim=True) / powers.sum(-1, keepdim=True)
        assert torch.allclose(found[place].double(), naive, rtol=1e-3, atol=1e-5)


def test_a_token_whose_values_are_all_the_same_keeps_its_share(seed: int) -> None:
    steps = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(4, 1)
    quantizer = ProbabilityQuantizer(4, torch.tensor(0.5))
    found = quantizer.carrying(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0]]), steps)
    assert found.isfinite().all()
    assert torch.allclose(found[0, [1, 3]], torch.tensor([0.25, 0.25]))
    quantizer.enabled = False
    rows = drawn(3, 4, seed=seed).softmax(-1)
    assert torch.equal(quantizer.carrying(rows, steps), rows)


LEARNED = [
    UniformQuantizer(3, torch.tensor(0.31), torch.tensor(3.4)),
    UniformQuantizer(3, torch.rand(6) + 0.1, torch.arange(6.0)),
    TokenQuantizer(3, torch.tensor(0.9)),
    TokenQuantizer(3, torch.tensor(0.9), rotation=1),
    TokenQuantizer(3, torch.tensor(0.9), rotation=1, gain=torch.arange(1.0, 7.0), shift=torch.linspace(-1, 1, 6)),
]


@pytest.mark.parametrize("quantizer", LEARNED, ids=lambda quantizer: quantizer.name)
def test_learning_changes_no_value_and_lowers_the_error(quantizer: ActivationQuantizer, seed: int) -> None:
    x = drawn(400, 6, seed=seed)
    assert torch.equal(quantizer.quantized(x), quantizer.rounded(x)[1])
    root = nn.ModuleDict({"inner": nn.ModuleDict({"own": quantizer})})
    plain = quantizer(x)
    before = {name: value.clone() for name, value in root.state_dict().items()}
    (first, *_) = ranges = trainable_ranges(root)
    assert first.name == f"inner.own.{quantizer.learned[0]}"
    optimiser = torch.optim.Adam([one.growth for one in ranges], lr=0.01)
    errors = []
    for one in ranges:
        one.refresh()
    with ranges[0].attached():
        inputs = x.clone().requires_grad_()
        found = quantizer(inputs)
        assert torch.allclose(found, plain, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), inputs, retain_graph=True)
        assert gradient.isfinite().all()
        for _ in range(150):
            for one in ranges:
                one.refresh()
            error = (quantizer(x) - x).square().mean()
            optimiser.zero_grad()
            error.backward()
            optimiser.step()
            errors.append(float(error.detach()))
    assert min(errors[-20:]) < errors[0] * 1.001
    for one in ranges[1:]:
        one.quantizer._buffers[one.key] = one.given
    assert all(torch.equal(value, before[name]) for name, value in root.state_dict().items())
    assert all(bool((one.result() > 0).all()) for one in ranges)


def test_the_gradient_of_a_scale_is_that_of_lsq(seed: int) -> None:
    """LSQ, arXiv 1902.08153, equation 3: ``q - x / s`` within the range, its ends outside; here times s."""
    x = 2 * drawn(500, seed=seed)
    quantizer = UniformQuantizer(3, torch.tensor(0.5), torch.tensor(3.0))
    (one,) = trainable_ranges(quantizer)
    with one.attached():
        one.refresh()
        quantizer(x).sum().backward()
    position = x / 0.5
    naive = torch.where(position < -3, -3.0, torch.where(position > 4, 4.0, position.round() - position))
    assert float(one.growth.grad) == pytest.approx(0.5 * float(naive.sum()), rel=1e-4)


def test_kinds_of_a_models_tensors() -> None:
    module = tiny_vit(0)
    batch = zoo.pixels(8, 1)
    model, layers, static = found_in(module, [batch], method="normalized")
    kinds = {site.name: site.quantizer["kind"] for site in static.sites}
    assert kinds["blocks.0.attn#1_left"] == "probabilities"
    assert static.folds
    by_name = {site.name: site.quantizer for site in static.sites}
    heads = module.blocks[0].attn.num_heads
    assert by_name["blocks.0.attn#1_right"]["channels"][0] == heads
    _, _, tokens = found_in(module, [batch], method="normalized", ranges="token")
    assert not tokens.folds
    by_name = {site.name: site.quantizer for site in tokens.sites}
    assert {by_name[name]["kind"] for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head")} == {"token"}
    assert (by_name["blocks.0.attn#0_left"]["axis"], by_name["blocks.0.attn#0_right"]["axis"]) == (-1, -2)
    assert (by_name["blocks.0.attn#1_right"]["kind"], by_name["blocks.0.attn#1_right"]["axis"]) == ("token", -1)
    assert by_name["blocks.0.mlp.fc2"]["channels"] == module.blocks[0].mlp.fc2.in_features
    quantized = tiny_vit(0)
    tokens.install(quantized)
    assert len(quantizers_of(quantized)) == len(tokens.sites)
    # A sample's result does not depend on the others.
    with torch.no_grad():
        assert torch.allclose(quantized(batch)[:3], quantized(batch[:3]), atol=1e-5)
    found = {one.name: one for one in survey(model, layers, [batch])}
    rows = found["blocks.0.attn#1_left"].vectors
    assert torch.allclose(rows.sum(-1), torch.ones(len(rows)), atol=1e-4)


def test_a_compressed_model_with_ranges_by_token_loads_with_the_same_outputs(tmp_path, seed: int) -> None:
    module = tiny_vit(seed)
    batches = [zoo.pixels(8, seed + number) for number in range(3)]
    result = mlorq.compress(
        module,
        batches,
        budget="6bit",
        preset="fast",
        activations={"bits": 6, "ranges": "token", "samples": 8},
        device="cpu",
    )
    result.save(tmp_path / "out")
    loaded = mlorq.load(tmp_path / "out", model=tiny_vit(seed))
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), result.model(batches[0]))

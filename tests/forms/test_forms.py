"""What every registered form promises, on random shapes and candidates: sizes, values, local costs, choices."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlorq.calibration.covariance import Moments
from mlorq.codecs.base import Accounting, Storage, ZeroPoint
from mlorq.costs.local import candidate_table
from mlorq.fitting.covariance_fit import CovarianceFit, Metric, covariance_fit
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS, Candidate, Form, Shape, enumerate_candidates, local_cost_array, smallest_size
from mlorq.forms.modules import CompressedLinear
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.registry import Settings
from mlorq.rounding.adaptive_rounding import _Objective
from tests.layers import hessian_fit, search_config, stored
from tests.rounding.test_rounding import correlated_tokens, moments_of

NAMES = FORMS.names()
FEW: dict[str, Any] = {
    "bits": [2, 3, 8],
    "factor_bits": [3, 6],
    "sum_bits": [2, 4],
    "sum_factor_bits": [3, 5],
    "sum_ranks": [2, 3, 7, 64],
}


def random_shape(rng: random.Random, form: Form[Any] | None = None) -> Shape:
    """A shape that all forms serve, or that one form serves."""
    while True:
        shape = Shape(rng.randint(5, 30), rng.randint(5, 30))
        if all(one.serves(shape) for one in ([form] if form else FORMS)):
            return shape


def settings_of(form: Form[Any], **values: Any) -> Settings:
    """A form's settings, of those that are given the keys that it has."""
    return form.settings(**{key: value for key, value in values.items() if key in form.settings.model_fields})


def candidates_of(form: Form[Any], shape: Shape, rng: random.Random, count: int = 4) -> list[Candidate]:
    found = form.enumerate(shape, settings_of(form, **FEW))
    return rng.sample(found, min(count, len(found)))


def random_weight(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = shape.out_features, shape.in_features
    weight = torch.randn(*size, generator=generator) * torch.rand(size[0], 1, generator=generator)
    return weight, torch.rand(*size, generator=generator).pow(4)


def moment_fit(weight: Tensor, seed: int, tokens: int = 500) -> CovarianceFit:
    """Closed forms on one half of random tokens, judged on the other."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    g = torch.randn(tokens, rows, generator=generator)
    folds = [
        Moments(part.T @ part / len(part), own.T @ own / len(own), len(part), len(own))
        for part, own in ((x[fold::2].double(), g[fold::2].double()) for fold in range(2))
    ]
    return covariance_fit(weight, folds, FitSettings(metric="moments"))


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", ["codes", "int16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_size_is_the_bytes_of_the_stored_tensors(name: str, zero_point: ZeroPoint, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    for attempt in range(3):
        shape = random_shape(rng, form)
        fit = hessian_fit(*random_weight(shape, seed + attempt), zero_point=zero_point)
        for candidate in candidates_of(form, shape, rng):
            layer = stored(fit, candidate)
            specs = form.matrices(candidate, shape, zero_point)
            assert list(layer.matrices) == list(specs) == list(form.names)
            total = 0
            for part, (rows, columns, codec) in specs.items():
                tensors = codec.pack(layer.matrices[part])
                laid_out = codec.layout(rows, columns)
                assert {key: (tuple(one.shape), str(one.dtype)) for key, one in tensors.items()} == {
                    key: (spec.shape, f"torch.{spec.dtype}") for key, spec in laid_out.items()
                }
                own = sum(tensor.nbytes for tensor in tensors.values())
                assert codec.size(rows, columns) == own
                assert codec.unpaid(rows, columns) >= own - rows * columns * codec.bits // 8
                assert torch.equal(codec.unpack(tensors, columns).dequantize(), layer.matrices[part].dequantize())
                total += own
            assert form.size(candidate, shape, Storage("exact", zero_point)) == total
            bits = sum(rows * columns * codec.bits for rows, columns, codec in specs.values())
            assert form.size(candidate, shape, Storage("paper", zero_point)) == -(-bits // 8)
            assert form.bit_operations(candidate, shape, 7.0) == 7.0 * bits
            module = CompressedLinear.from_layer(nn.Linear(shape.in_features, shape.out_features), layer)
            assert module.stored_bytes == total


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_layer_comes_back_from_its_tensors(name: str, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    shape = random_shape(rng, form)
    fit = hessian_fit(*random_weight(shape, seed))
    for candidate in candidates_of(form, shape, rng):
        layer = stored(fit, candidate)
        again = CompressedLayer.from_tensors(layer.layer, candidate, layer.tensors())
        assert torch.equal(again.dense(), layer.dense())
        assert again.tensors().keys() == layer.tensors().keys()


# -- values -----------------------------------------------------------------------------------------------------------


def sum_of_products(form: Form[Any], values: dict[str, Tensor]) -> Tensor:
    """Entry by entry: the sum over all inner indices of all terms."""
    total = None
    for term in form.terms:
        letters = "abcdefgh"[: len(term) + 1]
        pairs = ",".join(letters[index : index + 2] for index in range(len(term)))
        own = torch.einsum(f"{pairs}->{letters[0]}{letters[-1]}", *(values[name].double() for name in term))
        total = own if total is None else total + own
    assert total is not None
    return total


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_is_the_sum_of_the_products_and_the_layer_computes_with_it(name: str, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = random_shape(rng)
    for candidate in candidates_of(form, shape, rng):
        values = {
            part: torch.randn(*size, generator=generator, dtype=torch.float64)
            for part, size in form.sizes(candidate, shape).items()
        }
        weight = form.combine(values)
        torch.testing.assert_close(weight, sum_of_products(form, values))
        asked: list[tuple[str, bool]] = []
        bias = torch.randn(shape.out_features, generator=generator, dtype=torch.float64)

        def multiply(
            part: str, x: Tensor, last: bool, values: Any = values, asked: Any = asked, bias: Tensor = bias
        ) -> Tensor:
            asked.append((part, last))
            return nn.functional.linear(x, values[part], bias if last else None)

        x = torch.randn(6, shape.in_features, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(form.apply(multiply, x), x @ weight.T + bias)
        assert sorted(part for part, _ in asked) == sorted(form.names), "each matrix once"
        assert sum(last for _, last in asked) == 1


@pytest.mark.parametrize("metric", ["hessian", "moments"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_judged_is_what_the_matrices_give(name: str, metric: str, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    shape = random_shape(rng, form)
    weight, hessian = random_weight(shape, seed)
    fit: Any = hessian_fit(weight, hessian) if metric == "hessian" else moment_fit(weight, seed)
    for candidate in candidates_of(form, shape, rng):
        rounded = form.fit(fit, candidate)
        assert {part: one.store().shape for part, one in rounded.items()} == form.sizes(candidate, shape)
        for part, codec in form.codecs(candidate, "codes").items():
            codes: Any = rounded[part].codes
            assert not codes.is_floating_point() or torch.equal(codes, codes.round())
            assert 0 <= float(codes.min()) <= float(codes.max()) < 2**codec.bits
        values = {part: one.dequantize() for part, one in rounded.items()}
        dense = form.dense(fit, candidate)
        expected = sum_of_products(form, values) if name != "TCQ" else promised(form, fit, candidate, 0).double()
        torch.testing.assert_close(dense.double(), expected, rtol=1e-4, atol=1e-5)
        layer = CompressedLayer.of_rounded("layer", candidate, rounded)
        if name != "TCQ":  # rounding codes all columns again
            assert torch.equal(layer.dense(), dense), "what is stored is what was judged"


# -- local costs ------------------------------------------------------------------------------------------------------


def naive_cost(fit: Any, dense: Tensor) -> float:
    """The metric's cost of Ŵ, written out."""
    error = dense.double() - fit.weight.float().double()
    if isinstance(fit, CovarianceFit):
        inputs, gradients = fit.judge.inputs, fit.judge.gradients
        return float(torch.einsum("ab,ai,ij,bj->", gradients, error, inputs, error)) / error.numel()
    return float((fit.hessian.double().amax(1, keepdim=True) * error.square()).mean())


def at_full_rank(fit: Any, candidate: Candidate, largest: int) -> Tensor:
    """Leading columns and rows of factors that are quantized at full rank, or at the largest of many (METHOD 4, 7)."""
    rank, bits_a, bits_b = candidate.rank, candidate.bits_a, candidate.bits_b
    if isinstance(fit, CovarianceFit):
        a, b = fit.left_at_all_ranks(bits_a, largest), fit.right(bits_b, largest, sweeps=0).dequantize()
    else:
        a = fit.left_quantizer(bits_a).round_trip(fit.factors.a.float())
        b = fit.right_quantizer(bits_b).round_trip(fit.factors.b.float())
    return a[:, :rank] @ b[:rank]


def promised(form: Form[Any], fit: Any, candidate: Candidate, largest: int) -> Tensor:
    """The Ŵ whose cost a form's local cost is: its own, or one that costs nothing beside those of other ranks."""
    if form.name == "LR":
        return at_full_rank(fit, candidate, largest)
    if form.name == "TCQ":  # without sweeps
        return fit.trellis([candidate.bits], sweeps=0)[0].dequantize()
    if form.name == "QLR" and isinstance(fit, CovarianceFit):
        codes = fit.codes(candidate.bits).dequantize()
        return codes + at_full_rank(fit.of(fit.weight.float() - codes), candidate, min(fit.weight.shape))
    return form.dense(fit, candidate)


def expected_cost(form: Form[Any], fit: Any, candidate: Candidate, largest: int) -> float:
    """The local cost of a candidate: the metric's, or that of 3 bits in proportion to errors on Gaussian weights."""
    if form.name != "TCQ" or candidate.bits <= 3:
        return naive_cost(fit, promised(form, fit, candidate, largest))
    errors = {3: 0.01857, 4: 0.00481, 5: 0.001253, 6: 0.000338}
    return expected_cost(form, fit, Candidate("TCQ", bits=3), largest) * errors[candidate.bits] / errors[3]


@pytest.mark.parametrize("metric", ["hessian", "moments"])
@pytest.mark.parametrize("name", NAMES)
def test_local_costs_are_those_of_what_is_promised(name: str, metric: str, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    for attempt in range(2):
        shape = random_shape(rng, form)
        weight, hessian = random_weight(shape, seed + attempt)
        fit: Any = hessian_fit(weight, hessian) if metric == "hessian" else moment_fit(weight, seed + attempt)
        chosen = candidates_of(form, shape, rng, 8)
        largest = max(candidate.rank or 0 for candidate in chosen)
        expected = [expected_cost(form, fit, candidate, largest) for candidate in chosen]
        found = form.local_costs(fit, chosen)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-9)
        # The order in which candidates come, and which others come along, is no part of a cost; the largest rank is,
        # for A is rounded once for all ranks.
        np.testing.assert_allclose(list(form.local_costs(fit, chosen[::-1]))[::-1], found, rtol=1e-12)
        one = max(range(len(chosen)), key=lambda at: chosen[at].rank or 0)
        np.testing.assert_allclose(form.local_costs(fit, [chosen[one]]), [found[one]], rtol=1e-9)


def test_local_costs_of_all_forms_together_are_those_of_each(seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng)
    fit = hessian_fit(*random_weight(shape, seed))
    mixed = [candidate for form in FORMS for candidate in candidates_of(form, shape, rng)]
    rng.shuffle(mixed)
    found = local_cost_array(fit, mixed, [0] * len(mixed))
    for candidate, cost in zip(mixed, found, strict=True):
        (alone,) = FORMS[candidate.form].local_costs(fit, [candidate])
        assert cost == pytest.approx(alone, rel=1e-12)


def test_factors_that_others_beat_before_rounding_are_not_rounded(seed: int) -> None:
    """Their costs are those of the float factors; the front and its costs are those of a search without bounds."""
    rng = random.Random(seed)
    shape = Shape(rng.randint(24, 60), rng.randint(24, 60))
    fit: Any = moment_fit(random_weight(shape, seed)[0], seed)
    settings = {name: FORMS[name].settings() for name in ("Q", "LR", "TCQ")}
    found = enumerate_candidates(shape, settings, Storage("exact", "codes"))
    candidates, sizes = [one for one, _ in found], [size for _, size in found]
    costs, bounds = local_cost_array(fit, candidates, sizes), fit.float_product_costs()
    beaten, ranks = 0, []
    for candidate, size, cost in zip(candidates, sizes, costs, strict=True):
        if candidate.form != "LR":
            continue
        bound = bounds[candidate.rank - 1]
        better = [
            other
            for one, bytes_, other in zip(candidates, sizes, costs, strict=True)
            if one.form != "LR" and bytes_ <= size and other <= bound
        ]
        assert (cost == bound) == bool(better)
        beaten += bool(better)
        if not better:
            ranks.append(candidate.rank)
    assert beaten
    left = {candidate: cost for candidate, cost in zip(candidates, costs, strict=True) if candidate.form == "LR"}
    for (bits_a, bits_b), own in fit.product_costs([4, 6, 8], max(ranks, default=2)).items():
        for rank in ranks:
            candidate = Candidate("LR", bits_a=bits_a, bits_b=bits_b, rank=rank)
            if candidate in left and left[candidate] != bounds[rank - 1]:
                assert left[candidate] == pytest.approx(own[rank - 1], rel=1e-6)


# -- candidates -------------------------------------------------------------------------------------------------------


def by_the_rules(config: Any, rows: int, columns: int, groups: int) -> list[Candidate]:
    """METHOD 1, 2 and 7, by nested loops: ranks from 2, and nothing that is no smaller than the largest Q."""

    def bytes_of(parts: list[tuple[int, int, int]]) -> int:
        if config.accounting == "paper":
            return -(-sum(m * n * bits for m, n, bits in parts) // 8)
        extra = 2 + (1 if config.zero_point == "codes" else 2)
        return sum(m * (-(-n * bits // 8) + extra) for m, n, bits in parts)

    limit = max(bytes_of([(rows, columns, bits)]) for bits in config.bits)
    found = [Candidate("Q", bits=bits) for bits in config.bits]
    if groups == 1 and "LR" in config.forms:
        for bits_a, bits_b in product(config.factor_bits, repeat=2):
            for rank in range(2, min(rows, columns) + 1):
                parts = [(rows, rank, bits_a), (rank, columns, bits_b)]
                if rank % config.rank_multiple == 0 and bytes_of(parts) < limit:
                    found.append(Candidate("LR", bits_a=bits_a, bits_b=bits_b, rank=rank))
    if groups == 1 and "QLR" in config.forms:
        for bits, width, rank in product(config.sum_bits, config.sum_factor_bits, config.sum_ranks):
            parts = [(rows, columns, bits), (rows, rank, width), (rank, columns, width)]
            if 2 <= rank <= min(rows, columns) and bytes_of(parts) < limit:
                found.append(Candidate("QLR", bits=bits, bits_a=width, bits_b=width, rank=rank))
    return found


@pytest.mark.parametrize("accounting", ["exact", "paper"])
@pytest.mark.parametrize("zero_point", ["codes", "int16"])
def test_candidates_are_those_of_the_rules(accounting: Accounting, zero_point: ZeroPoint, seed: int) -> None:
    rng = random.Random(seed)
    kept_out = 0
    for _ in range(12):
        shape = random_shape(rng)._replace(groups=rng.choice([1, 1, 1, 2]))
        config = search_config(
            forms=["Q", *rng.sample(["LR", "QLR"], rng.randint(0, 2))],
            bits=sorted(rng.sample(range(2, 9), rng.randint(1, 4))),
            factor_bits=sorted(rng.sample(range(2, 9), rng.randint(0, 3))),
            rank_multiple=rng.randint(1, 4),
            sum_bits=sorted(rng.sample(range(2, 9), 2)),
            sum_factor_bits=sorted(rng.sample(range(2, 9), 2)),
            sum_ranks=sorted({1, 2, 5, 9, min(shape[:2]), 40}),
            accounting=accounting,
            zero_point=zero_point,
        )
        found = enumerate_candidates(shape, config.form_settings, config.storage)
        rules = by_the_rules(config, *shape)
        assert [candidate for candidate, _ in found] == rules
        assert len({candidate.candidate_id for candidate, _ in found}) == len(found)
        limit = max(size for candidate, size in found if FORMS[candidate.form].uniform)
        for candidate, size in found:
            assert size == FORMS[candidate.form].size(candidate, shape, config.storage)
            assert FORMS[candidate.form].uniform or size < limit
        assert smallest_size(shape, config.form_settings, config.storage).bytes == min(size for _, size in found)
        kept_out += sum(len(FORMS[name].enumerate(shape, own)) for name, own in config.form_settings.items())
        kept_out -= len(found)
    assert kept_out > 0, "some were too large"


@pytest.mark.parametrize("name", NAMES)
def test_points_of_a_curve_have_positions_of_their_own(name: str, seed: int) -> None:
    form, shape = FORMS[name], random_shape(random.Random(seed))
    points = [(form.curve(one), form.position(one)) for one in form.enumerate(shape, settings_of(form, **FEW))]
    assert len(set(points)) == len(points)
    settings = settings_of(form, **FEW)
    for most in (1, 3):
        lengths = [sum(curve == own for own, _ in points) for curve in {curve for curve, _ in points}]
        assert sum(min(most, length) for length in lengths) <= form.measurements(settings, most)


@pytest.mark.parametrize("name", NAMES)
def test_no_candidate_is_described_in_more_letters_than_the_largest(name: str, seed: int) -> None:
    form, rng = FORMS[name], random.Random(seed)
    for _ in range(5):
        shape = random_shape(rng)
        longest = len(json.dumps(asdict(form.largest(shape))))
        assert all(len(json.dumps(asdict(one))) <= longest for one in candidates_of(form, shape, rng, 50))


@pytest.mark.parametrize("name", NAMES)
def test_candidates_that_lack_a_field_or_have_one_too_many_are_refused(name: str, seed: int) -> None:
    form, shape = FORMS[name], Shape(9, 11)
    for candidate in candidates_of(form, shape, random.Random(seed)):
        values = asdict(candidate)
        for field in ("bits", "bits_a", "bits_b", "rank"):
            wrong = Candidate(**values | {field: 3 if values[field] is None else None})
            with pytest.raises(ValueError, match=f"form {name} takes"):
                form.size(wrong, shape, Storage())


# -- gradients of adaptive rounding -----------------------------------------------------------------------------------


class Chain(Form[Settings]):
    """Terms of one, two and three factors, to be combined as no registered form does."""

    name = "chain"
    terms = (("u", "v", "w"), ("a", "b"), ("weight",))
    inner = 4

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        rows, columns, k = shape.out_features, shape.in_features, self.inner
        sizes = ((rows, k), (k, k + 1), (k + 1, columns), (rows, k), (k, columns), (rows, columns))
        return dict(zip(self.names, sizes, strict=True))

    def _none(self, *_: Any) -> Any:
        raise AssertionError("gradients ask for no such thing")

    enumerate = candidate_id = codecs = largest = fit = local_costs = curve = _none


@pytest.mark.parametrize("form", [*FORMS, Chain()], ids=lambda form: form.name)
def test_gradients_by_the_matrices_are_autograds(form: Form[Any], seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        shape = random_shape(rng)
        chosen = [Candidate("chain")] if form.name == "chain" else candidates_of(form, shape, rng, 2)
        x, y = correlated_tokens(200, shape.in_features, seed)
        weight, _ = random_weight(shape, seed)
        for candidate in chosen:
            values = {
                part: torch.randn(*size, generator=generator).requires_grad_(True)
                for part, size in form.sizes(candidate, shape).items()
            }
            loss = (x @ weight.T - y @ form.combine(values).T).square().sum(1).mean() / shape.out_features
            expected = torch.autograd.grad(loss, list(values.values()))
            with torch.no_grad():
                found = _Objective(weight, moments_of(x, y), form).gradients(values)
            assert set(found) == set(values)
            for part, wanted in zip(values, expected, strict=True):
                torch.testing.assert_close(found[part], wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()))


# -- a form that nobody knows -----------------------------------------------------------------------------------------


class Halves(type(FORMS["Q"])):  # type: ignore[misc]
    """Codes, by another name: what a form of a package of its own may be."""

    name = "halves"
    uniform = False

    def candidate_id(self, candidate: Candidate) -> str:
        return f"halves{candidate.bits}"


def test_a_form_from_outside_is_in_the_table_of_candidates(seed: int) -> None:
    weight, hessian = random_weight(Shape(12, 20), seed)
    with FORMS.added(Halves()):
        config = search_config(forms=["Q", "halves"], bits=[2, 3, 8])
        table = candidate_table(hessian_fit(weight, hessian), Shape(12, 20), config.form_settings, config.storage)
        rows = {row["candidate_id"]: row for row in table.to_pylist()}
        # It is not uniform: what is as large as the largest Q is left out.
        assert set(rows) == {"Q2", "Q3", "Q8", "halves2", "halves3"}
        assert rows["halves3"]["local_cost"] == rows["Q3"]["local_cost"]
        assert Candidate.of_row(rows["halves2"]) == Candidate("halves", bits=2)
    assert "halves" not in FORMS


def test_the_judging_metric_is_not_the_fitted_one(seed: int) -> None:
    """Local costs under moments are taken on samples that nothing was fitted to."""
    weight, _ = random_weight(Shape(14, 18), seed)
    fit = moment_fit(weight, seed, tokens=60)
    own = CovarianceFit(weight, fit.metric, fit.percentiles)
    candidate = Candidate("Q", bits=3)
    (held_out,), (fitted,) = (FORMS["Q"].local_costs(one, [candidate]) for one in (fit, own))
    assert held_out == pytest.approx(naive_cost(fit, FORMS["Q"].dense(fit, candidate)), rel=1e-4)
    assert fitted == pytest.approx(
        fit.metric.cost(FORMS["Q"].dense(fit, candidate) - weight) / weight.numel(), rel=1e-4
    )
    assert isinstance(fit.judge, Metric)
    assert held_out != pytest.approx(fitted, rel=1e-3)

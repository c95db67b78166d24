"""Error ratios of layers' inputs, against explicit products, and the findings that follow from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlorq.calibration.covariance import Moments
from mlorq.calibration.coverage import DAMPING, Coverage, between_folds, damped_factor, held_out, mean_scores
from mlorq.calibration.diagnosis import Diagnosis
from tests.nets import float_model

WIDTH = 12


def moments(rows: torch.Tensor) -> Moments:
    rows = rows.double()
    return Moments(rows.T @ rows / len(rows), torch.eye(1, dtype=torch.float64), len(rows), len(rows))


def rows(count: int, seed: int, mixing: torch.Tensor | None = None) -> torch.Tensor:
    made = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return made if mixing is None else made @ mixing


def coverage(count: int, seed: int = 0) -> Coverage:
    folds = [moments(rows(count, seed + fold)) for fold in range(2)]
    factor = damped_factor(folds[0].inputs)
    assert factor is not None
    return between_folds("layer", folds, factor)


def test_ratio_between_folds_is_that_of_explicit_products():
    own, other = rows(20, 0).double(), 3 * rows(30, 1).double()  # the scale does not matter
    found = between_folds("a", [moments(own), moments(other)], damped_factor(moments(own).inputs))
    second = own.T @ own / len(own)
    inverse = torch.linalg.inv(second + DAMPING * second.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64))

    def relative(values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,ij,tj->", values, inverse, values) / values.square().sum()

    assert found.ratio == pytest.approx(float(relative(other) / relative(own)), rel=1e-9)
    assert found.rank == pytest.approx(float((inverse @ second).trace()), rel=1e-9)
    assert (found.width, found.tokens) == (WIDTH, 20)


def test_scores_of_a_model_are_those_of_explicit_products():
    model = float_model(nn.Sequential(nn.Linear(WIDTH, 3)))
    factor = damped_factor(moments(rows(20, 0)).inputs)
    batches = [rows(5, 1), rows(4, 2)]
    (found,) = mean_scores(model, {"0": factor}, batches).values()
    x = torch.cat(batches).double()
    assert found == pytest.approx(
        float(torch.linalg.solve_triangular(factor, x.T, upper=False).square().sum() / x.square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("sizes", [(4, 4), (3, 2, 1, 2), (1, 1, 1)])
def test_held_out_samples_are_those_of_the_second_fold(sizes):
    numbers = torch.arange(sum(sizes)).float()[:, None]
    found = torch.cat(list(held_out(numbers.split(sizes), sum(sizes), 100)))
    assert found[:, 0].tolist() == numbers[1::2, 0].tolist()
    assert sum(len(batch) for batch in held_out(numbers.split(sizes), sum(sizes), 1)) <= 2


def test_few_samples_are_found():
    few, enough = coverage(3), coverage(600)
    assert few.rank < 4 < enough.rank
    (line,) = Diagnosis(6, [few], {}).warnings()
    assert "too few calibration samples" in line
    assert "6 samples" in line
    assert "layer" in line
    assert Diagnosis(1200, [enough], {}).warnings() == []


def test_other_data_is_found():
    model = float_model(nn.Sequential(nn.Linear(WIDTH, 3)))
    narrow = torch.diag(torch.linspace(1, 0.02, WIDTH))
    factor = damped_factor(moments(rows(500, 0, narrow)).inputs)
    score = {
        name: mean_scores(model, {"0": factor}, [rows(200, seed, mixing)])["0"]
        for name, seed, mixing in (("own", 1, narrow), ("same", 2, narrow), ("other", 3, None))
    }

    def diagnosis(name: str) -> Diagnosis:
        return Diagnosis(500, [Coverage("0", WIDTH, 250, 9.0, 1.0, score[name] / score["own"])], {})

    (line,) = diagnosis("other").warnings()
    assert "another kind" in line
    assert diagnosis("same").warnings() == []


def test_a_gap_between_output_errors_is_found():
    (line,) = Diagnosis(8, [], {"calibration": 0.01, "evaluation": 0.09}).warnings()
    assert "9.0 times" in line
    assert Diagnosis(8, [], {"calibration": 0.01, "evaluation": 0.012}).warnings() == []
    assert Diagnosis(8, [], {"calibration": 1e-8, "evaluation": 9e-8}).warnings() == [], "too small to matter"
    assert Diagnosis(8, [], {}).to_json()["gap"] is None


def test_inputs_that_are_zero_have_no_factor():
    assert damped_factor(torch.zeros(3, 3, dtype=torch.float64)) is None

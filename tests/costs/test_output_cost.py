"""Costs of the output against their definitions, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from mlorq.costs.output_cost import OutputCost
from mlorq.errors import DataError, ModelError


def outputs_of(seed: int, classes: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(seed)
    references = [3 * torch.randn(size, classes) for size in (4, 3)]
    return references, [reference + 0.3 * torch.randn_like(reference) for reference in references]


def test_nmse_is_the_error_by_the_power(seed):
    references, outputs = outputs_of(seed)
    error = sum(
        (a - b) ** 2
        for x, y in zip(outputs, references, strict=True)
        for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    )
    power = sum(b**2 for y in references for b in y.flatten().tolist())
    assert OutputCost("nmse", references)(outputs) == pytest.approx(error / power, rel=1e-6)
    assert OutputCost("nmse", references)(references) == 0
    assert OutputCost("nmse", [torch.zeros(2, 3)])([torch.ones(2, 3)]) == 0  # nothing to be relative to


def test_kl_is_the_mean_divergence_of_the_predictions(seed):
    references, outputs = outputs_of(seed)
    total = 0.0
    for x, y in zip(torch.cat(outputs).double().tolist(), torch.cat(references).double().tolist(), strict=True):
        p = [math.exp(value) / sum(map(math.exp, y)) for value in y]
        q = [math.exp(value) / sum(map(math.exp, x)) for value in x]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    cost = OutputCost("kl", references)
    assert cost(outputs) == pytest.approx(total / 7, rel=1e-6)
    assert cost(references) == 0
    shifted = [reference + 2.0 for reference in references]  # the same predictions
    assert cost(shifted) == pytest.approx(0, abs=1e-10)


def test_kl_of_a_tiny_change_keeps_its_digits(seed):
    torch.manual_seed(seed)
    reference = torch.randn(6, 4)
    change = torch.randn(6, 4)
    small = [OutputCost("kl", [reference])([reference + step * change]) for step in (1e-2, 1e-3)]
    assert small[0] / small[1] == pytest.approx(100, rel=0.05)  # quadratic


def test_task_cost_is_the_rise_of_the_cross_entropy(seed):
    references, outputs = outputs_of(seed)
    labels = [torch.randint(0, 5, (len(reference),)) for reference in references]

    def loss(values: list[torch.Tensor]) -> float:
        rows = zip(torch.cat(values).double(), torch.cat(labels).tolist(), strict=True)
        return (
            sum(math.log(sum(math.exp(value) for value in row.tolist())) - float(row[label]) for row, label in rows) / 7
        )

    rise = loss(outputs) - loss(references)
    assert OutputCost("task", references, labels)(outputs) == pytest.approx(max(0, rise), abs=1e-9)
    other = OutputCost("task", outputs, labels)(references)
    assert other == pytest.approx(max(0, -rise), abs=1e-9)
    assert (other == 0) != (rise < 0)  # a loss that falls costs nothing


def test_task_cost_of_a_regressor_is_the_rise_of_the_squared_error():
    reference = torch.tensor([[1.0], [2.0]])
    labels = [torch.tensor([1.5, 2.0])]
    assert OutputCost("task", [reference], labels)([torch.tensor([[0.5], [2.0]])]) == pytest.approx((1.0 - 0.25) / 2)


def test_what_a_cost_needs_is_asked_for():
    with pytest.raises(ModelError, match="kl needs a model with outputs of two classes"):
        OutputCost("kl", [torch.zeros(2, 1)])
    with pytest.raises(DataError, match="task needs calibration data with labels"):
        OutputCost("task", [torch.zeros(2, 3)])
    with pytest.raises(DataError, match="one label per sample"):
        OutputCost("task", [torch.zeros(2, 3)], [torch.zeros(3, dtype=torch.long)])
    with pytest.raises(DataError, match="calibration label 3 is out of range: the model has 3 classes"):
        OutputCost("task", [torch.zeros(2, 3)], [torch.tensor([0, 3])])


@pytest.mark.parametrize("name", ["nmse", "kl"])
def test_outputs_of_another_size_are_refused(name: str) -> None:
    cost = OutputCost(name, [torch.rand(2, 3)])
    with pytest.raises(
        ModelError, match=r"shape \(2, 4\) with compressed layers and \(2, 3\) without: its size depends"
    ):
        cost([torch.rand(2, 4)])

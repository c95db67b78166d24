"""f(x) of models that return several tensors: all of them are weighed, and a warning names them."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.errors import ModelError
from mlorq.models.output_tensors import output_tensor, weighed_outputs
from tests.zoo import QUICK

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Record:
    hidden: Tensor
    mask: Tensor
    pooled: Tensor | None = None


def maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, generator=generator), torch.randn(2, 5, generator=generator)


def test_one_tensor_is_taken_as_it_is():
    first, second = maps()
    for output in (first, {"loss": second, "logits": first}, (first, second), (first, {"more": second})):
        assert output_tensor(output, 2) is first
        assert weighed_outputs(output, 2) == []


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda a, b: [a, b], ["0", "1"]),
        (lambda a, b: {"hidden": a, "pooled": b}, ["hidden", "pooled"]),
        (lambda a, b: Record(a, torch.ones(2, 3, dtype=torch.bool), b), ["hidden", "pooled"]),
        (lambda a, b: {"maps": Pair(a, b), "count": torch.tensor(3.0)}, ["maps.left", "maps.right"]),
        (lambda a, b: {"states": (a, a), "anchors": torch.rand(7, 4), "pooled": b}, ["states.0", "pooled"]),
    ],
)
def test_all_tensors_of_the_samples_are_joined(wrap: Any, names: list[str]) -> None:
    first, second = maps()
    assert weighed_outputs(wrap(first, second), 2) == names
    assert torch.equal(output_tensor(wrap(first, second), 2), torch.cat([first.flatten(1), second], 1))


def test_outputs_without_floating_point_numbers_are_refused():
    for output in (None, {"ids": torch.arange(2)}, ["text"]):
        with pytest.raises(ModelError, match="without a tensor of floating-point numbers"):
            output_tensor(output, 2)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.two = nn.Linear(12, 24), nn.Linear(24, 4), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(x))
        return {"one": self.one(x), "two": self.two(x)}


def test_every_head_of_a_model_has_a_cost():
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="errors are weighed in 'one', 'two', joined"):
        result = mlorq.compress(
            TwoHeads(), [x], budget="6bit", preset="quick", rounding="nearest", search=QUICK, device="cpu"
        )
    costs = dict(zip(*(result.allocation[key].to_pylist() for key in ("layer", "global_cost")), strict=True))
    assert set(costs) == {"body", "one", "two"}
    assert min(costs.values()) > 0
    found, wanted = result.model(x), TwoHeads()(x)
    for name in ("one", "two"):
        error = (found[name] - wanted[name]).square().sum() / wanted[name].square().sum()
        assert 0 < error < 0.01

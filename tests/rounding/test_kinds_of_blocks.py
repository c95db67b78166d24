"""Blocks and whole models are trained whatever a block keeps, shares, returns or skips."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from mlorq.models.passes import leaving_no_trace
from mlorq.rounding.paired_forward import PairedForward

WIDTH = 12
CHEAP: dict[str, Any] = {
    "budget": "6bit",
    "preset": "fast",
    "search": {"forms": ["Q"], "bits": [4, 6, 8], "percentiles": [1.0], "samples": 4, "hessian_samples": 8},
    "device": "cpu",
}
TRAINING = {"method": "block", "iterations": 8, "tuning": 8, "batch_size": 4}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def change(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.norm(x))))

    def forward(self, x: Tensor, _: Any) -> Any:
        return x + self.change(x)


class TwoNames(Plain):
    """One of its layers has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.c = self.again = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, _: Any) -> Any:
        return x + self.change(x) + self.c(x) + self.again(x.tanh())


class Recurrent(Plain):
    """Reads the state that its last pass left, at positions where there is one, as models of recurrences do."""

    state: Tensor | None = None

    def forward(self, x: Tensor, _: Any) -> Any:
        found = self.change(x)
        before = torch.zeros_like(found) if self.state is None or self.state.shape != x.shape else self.state
        self.state = found
        return x + found + 0 * before


class Remembering(Plain):
    """Adds the state of its pass to a cache that it was given, and reads all that this holds."""

    def forward(self, x: Tensor, cache: Any) -> Any:
        cache.states.append(self.change(x))
        return x + sum(cache.states)


class Beside(Plain):
    """What it returns does not depend on its layers."""

    def forward(self, x: Tensor, cache: Any) -> Any:
        cache.beside = cache.beside + self.change(x + cache.beside)
        return x


class OfParameters(Plain):
    """Looks up its parameters by name."""

    def forward(self, x: Tensor, _: Any) -> Any:
        known = dict(self.named_parameters())
        return x + self.change(x.to(known["norm.weight"].dtype)) * self.state_dict()["norm.weight"]


class Skipped(Plain):
    """Every second call does nothing."""

    calls = 0

    def forward(self, x: Tensor, _: Any) -> Any:
        Skipped.calls += 1
        return x + self.change(x) if Skipped.calls % 2 else x


class Cache:
    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.beside: Tensor | float = 0.0


class Net(nn.Module):
    def __init__(self, kind: type[Plain]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.head = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList([kind(), kind()]),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x, cache = self.first(x), Cache()
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x + cache.beside)


def batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 4, WIDTH, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", [TwoNames, Recurrent, Remembering, Beside, OfParameters])
def test_a_model_of_such_blocks_is_trained(kind: type[Plain]) -> None:
    module = Net(kind).eval()
    result = mlorq.compress(module, batches(), rounding=TRAINING, **CHEAP)
    assert {"reconstruct", "tune"} <= set(result.metrics["seconds"]), "blocks and the whole model are trained"
    wanted = torch.cat([module(x) for x in batches()])
    found = torch.cat([result.model(x) for x in batches()])
    assert (found - wanted).square().sum() < 0.01 * wanted.square().sum()


def test_blocks_that_are_skipped_in_some_passes_are_no_error() -> None:
    assert mlorq.compress(Net(Skipped).eval(), batches(), rounding=TRAINING, **CHEAP).metrics["nmse"] < float("inf")


@pytest.mark.parametrize("kind", [Recurrent, Remembering])
def test_runs_of_a_block_do_not_depend_on_earlier_ones(kind: type[Plain]) -> None:
    model = from_module(Net(kind))
    names = find_layers(model, batches()[0]).blocks
    assert names == ["blocks.0", "blocks.1"]
    paired = PairedForward(model, names, batches())
    call = paired.block_calls(1)[0]
    before = copy.copy(vars(paired.block(1)))
    first, again = (paired.run_block(1, call) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first.float(), call.target)
    assert vars(paired.block(1)) == before


def test_a_pass_leaves_no_trace() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].seen, module[0].by_name, module[0].count = [1], {"a": 1}, 0
    seen, weight, mean = module[0].seen, module[0].weight, module[1].running_mean
    with leaving_no_trace(module):
        module[0].seen.append(2)
        module[0].by_name["b"] = module[0].by_name.pop("a")
        module[0].count, module[0].new = 3, torch.ones(1)
        module[1].running_mean = torch.ones(2)
    assert module[0].seen is seen
    assert (seen, module[0].by_name, module[0].count) == ([1], {"a": 1}, 0)
    assert not hasattr(module[0], "new")
    assert module[0].weight is weight
    assert module[1].running_mean is mean

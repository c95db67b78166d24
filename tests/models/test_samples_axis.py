"""Layers whose inputs have tokens first and samples second are compressed, with statistics of each sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from mlorq.models.unfolding import input_tokens
from tests.zoo import QUICK


def tokens(samples: int, count: int = 5) -> Tensor:
    return torch.randn(samples, count, 8, generator=torch.Generator().manual_seed(1))


class SequenceFirst(nn.Module):
    """An encoder that transposes its input, as sequence-first code does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x.transpose(0, 1))).mean(0))


class Joined(nn.Module):
    """An encoder that joins all samples to one sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.body(x.flatten(0, 1)[None])
        return self.head(torch.relu(joined).reshape(x.shape).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


@pytest.mark.parametrize("count", [5, 4])
def test_the_samples_of_a_sequence_first_layer_are_found(count: int) -> None:
    x = tokens(4, count)  # also with as many tokens as samples
    model = from_module(SequenceFirst())
    found = find_layers(model, x)
    assert [layer.name for layer in found.layers] == ["body", "head"]
    body = model.module.get_submodule("body")
    assert torch.equal(input_tokens(body, x.transpose(0, 1), 4), x)


def test_the_samples_of_one_joined_sequence_are_found() -> None:
    x = tokens(4)
    model = from_module(Joined())
    assert [layer.name for layer in find_layers(model, x).layers] == ["body", "head"]
    assert torch.equal(input_tokens(model.module.get_submodule("body"), x.reshape(1, 20, 8), 4), x)


def test_as_many_tokens_as_samples_do_not_turn_the_axes() -> None:
    model = from_module(nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(32, 3)))
    x = tokens(4, 4)
    assert len(find_layers(model, x).layers) == 2
    assert torch.equal(input_tokens(model.module[0], x, 4), x)


@pytest.mark.parametrize("kind", [SequenceFirst, Joined, Attention])
def test_sequence_first_models_are_compressed(kind: type[nn.Module]) -> None:
    x, module = tokens(8), kind().eval()
    result = mlorq.compress(module, [x], budget="8bit", preset="quick", rounding="nearest", search=QUICK, device="cpu")
    assert result.left_float == [] or not [one for one in result.left_float if "rows" in one.reason]
    wanted = module(x)
    assert (result.model(x) - wanted).norm() < 0.05 * wanted.norm()

"""Layers that a model uses in ways that forbid their replacement stay float, and are named with bytes and reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mlorq
from mlorq.errors import ConfigError, ModelError
from mlorq.forms.trial import changed_by_replacement
from mlorq.models import from_module
from mlorq.models.layers import find_layers

QUICK: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"sensitivity": "closed_form"}}


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (6, 12)), generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two layers and a head; subclasses use the second layer in their own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def use(self, x: Tensor) -> Tensor:
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.use(self.first(x))))


class Detached(Net):
    def use(self, x: Tensor) -> Tensor:
        return self.second(x).detach()


class Frozen(Net):
    def use(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(x)


class Steps(Net):
    def use(self, x: Tensor) -> Tensor:
        return (4 * self.second(x)).round()


class Idle(Net):
    """The second layer runs, but nothing reads its output."""

    def use(self, x: Tensor) -> Tensor:
        self.second(x)
        return x


class Router(nn.Linear):
    """A layer of a mixture of experts that returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.softmax(-1), logits


class Routed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = Router(12, 12)

    def use(self, x: Tensor) -> Tensor:
        return x * self.second(x)[0]


def test_a_layer_that_returns_several_tensors_stays_float() -> None:
    found = find_layers(from_module(Routed()), inputs())
    assert [layer.name for layer in found.layers] == ["first", "head"]
    assert [one.name for one in found.skipped] == ["second"]
    assert "forward of its own" in found.skipped[0].reason


@pytest.mark.parametrize("kind", [Detached, Frozen, Steps])
def test_layers_without_a_gradient_stay_float(kind):
    module = kind().eval()
    found = find_layers(from_module(module), inputs())
    assert [layer.name for layer in found.layers] == ["head"]
    assert [one.name for one in found.skipped] == ["first", "second"], "no gradient reaches the layer before it either"
    assert all("no gradient of the output reaches it" in one.reason for one in found.skipped)
    assert [one.bytes for one in found.skipped] == [4 * 12 * 12] * 2
    wanted = module(inputs()).detach()
    with pytest.warns(UserWarning, match=r"layers stay float.*'first' \(576 B\).*no gradient"):
        result = mlorq.compress(module, [inputs(), inputs(seed=2)], budget="40%", device="cpu", **QUICK)
    assert (result.model(inputs()) - wanted).square().sum() < 1e-2 * wanted.square().sum()
    assert [one.name for one in result.left_float] == ["first", "second"]


def test_a_layer_whose_output_is_not_used_costs_nothing_and_is_compressed():
    found = find_layers(from_module(Idle()), inputs())
    assert [layer.name for layer in found.layers] == ["first", "second", "head"]


def test_a_gradient_that_cannot_be_computed_is_one_line():
    class Overwriting(Net):
        def use(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.second(x))
            return torch.sigmoid(x.mul_(2)).mul_(x)

    with pytest.raises(ModelError, match=r"the gradient of the model's output cannot be computed: .*inplace operation"):
        find_layers(from_module(Overwriting()), inputs())


def test_a_model_without_any_gradient_is_refused_with_the_reason():
    class NoGradient(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ModelError, match=r"no compressible layers .*'first': .*no gradient of the output"):
        find_layers(from_module(NoGradient()), inputs())


class Positions(Net):
    """The second layer reads a table of positions, of as many rows as it has."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("table", inputs(rows, 12, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x) + self.second(self.table).mean(0))).mean(1)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_rows_that_belong_to_no_sample_leave_the_layer_float(rows):
    module = Positions(rows).eval()
    found = find_layers(from_module(module), inputs(4, 5, 12))
    assert [layer.name for layer in found.layers] == ["first", "head"]
    (one,) = found.skipped
    assert one.name == "second"
    assert one.reason.startswith(f"its inputs have {rows} rows for 4 samples, not the same number for each")
    single = find_layers(from_module(module), inputs(1, 5, 12))
    assert [layer.name for layer in single.layers] == ["first", "second", "head"]
    batches = [inputs(4, 5, 12), inputs(3, 5, 12, seed=2)]
    with pytest.warns(UserWarning, match=r"'second' \(576 B\)"):
        result = mlorq.compress(module, batches, budget="40%", device="cpu", **QUICK)
    assert set(result.allocation["layer"].to_pylist()) == {"first", "head"}


@pytest.mark.parametrize(
    ("shared", "left"), [(True, ["query_proj", "key_proj"]), (False, ["pos_key_proj", "pos_query_proj"])]
)
def test_relative_positions_of_deberta_belong_to_no_sample(shared: bool, left: list[str]) -> None:
    """Layers that also get the table of relative positions stay float, and all others are compressed."""
    config = transformers.DebertaV2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=shared,
    )
    module = transformers.DebertaV2ForSequenceClassification(config).eval()
    texts = torch.randint(5, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    found = find_layers(from_module(module), texts)
    assert [one.name.rsplit(".", 1)[1] for one in found.skipped] == left
    assert all("rows for 2 samples" in one.reason for one in found.skipped)
    linear = {name for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    assert {layer.name for layer in found.layers} == linear - {one.name for one in found.skipped}


class Direct(nn.Module):
    """Reads parts of weights directly, and has weights that are not linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.head = nn.Linear(12, 12), nn.Linear(12, 3)
        self.mix = nn.Parameter(torch.randn(12, 12))
        self.experts = nn.Parameter(torch.randn(2, 12, 12))
        self.up = nn.ConvTranspose1d(12, 12, 1, groups=2)
        self.memory = nn.LSTM(12, 12, batch_first=True)
        self.table = nn.Embedding(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.qkv.weight * 2) + x @ self.mix[:, :12] + self.table.weight[0]
        x = torch.bmm(x[:2], self.experts).mean(0) + self.memory(x)[0]
        return self.head(self.up(x.transpose(1, 2)).mean(-1))


def test_all_weights_that_stay_float_are_listed_with_their_bytes():
    module = Direct().eval()
    found = find_layers(from_module(module), inputs(4, 5, 12))
    assert [layer.name for layer in found.layers] == ["head"]
    assert [tuple(one) for one in found.skipped] == [
        ("qkv", "never called: its weight is read directly, by mul", 576),
        ("up", "a parameter of ConvTranspose1d with 2 groups", 288),
    ]
    assert found.skipped[1].is_foreseen
    others = {one.name: (one.reason, one.bytes) for one in found.others}
    assert others == {
        "mix": ("a parameter of Direct, read by matmul", 576),
        "experts": ("a parameter of Direct, read by bmm", 1152),
        "memory.weight_ih_l0": ("a parameter of LSTM, read by lstm", 2304),
        "memory.weight_hh_l0": ("a parameter of LSTM, read by lstm", 2304),
        "table": ("an embedding table (option embeddings quantizes tables)", 192),
    }
    weights = sum(value.nbytes for value in module.parameters() if value.dim() > 1)
    listed = sum(one.bytes for one in (*found.skipped, *found.others))
    assert listed + module.head.weight.nbytes == weights


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ["haed"]}, "search.exclude: pattern 'haed' matches no linear layer .*did you mean 'head'"),
        ({"include": ["*", "secnd"]}, "search.include: pattern 'secnd' .*did you mean 'second'"),
        ({"exclude": ["inner"]}, "for all layers inside it: 'inner\\.\\*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(options, words):
    module = Net()
    module.inner = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=words):
        find_layers(from_module(module), inputs(), **options)


class AsksForItsClass(Net):
    def use(self, x: Tensor) -> Tensor:
        return self.second(x) if type(self.second) is nn.Linear else x


class ReadsAnAttribute(Net):
    def use(self, x: Tensor) -> Tensor:
        assert self.second.special
        return self.second(x)


@pytest.mark.parametrize("kind", [AsksForItsClass, ReadsAnAttribute])
def test_layers_whose_replacement_changes_the_function_stay_float(kind):
    module = kind().eval()
    module.second.special = True
    model = from_module(module)
    found = find_layers(model, inputs())
    assert [layer.name for layer in found.layers] == ["first", "second", "head"]
    reasons = changed_by_replacement(model, found.layers, inputs())
    assert list(reasons) == ["second"]
    assert "replacement" in reasons["second"]
    assert type(module.second) is nn.Linear, "the model itself is not changed"
    wanted = module(inputs()).detach()
    with pytest.warns(UserWarning, match="replacement"):
        result = mlorq.compress(module, [inputs(), inputs(seed=2)], budget="40%", device="cpu", **QUICK)
    assert set(result.allocation["layer"].to_pylist()) == {"first", "head"}
    assert (result.model(inputs()) - wanted).square().sum() < 1e-2 * wanted.square().sum()


def test_a_replacement_that_changes_nothing_is_accepted():
    model = from_module(Net())
    layers = find_layers(model, inputs()).layers
    assert changed_by_replacement(model, layers, inputs()) == {}


def test_random_outputs_are_reported():
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, training=True))

    model = from_module(Random())
    layers = find_layers(model, inputs()).layers
    with pytest.warns(UserWarning, match="other outputs in every pass over the same batch"):
        assert changed_by_replacement(model, layers, inputs()) == {}

"""``mlorq.compress`` and ``mlorq.load``: any module, in memory, with the options that the documentation names."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

import mlorq
from mlorq.errors import BudgetError, CheckpointError, ConfigError, DataError, ModelError
from steps.progress_line import ProgressLine
from tests.nets import SharedNet, SkipNet, TokenNet, images

QUICK = {"samples": 8, "points": 2, "hessian_mode": "exact", "factor_bits": [4, 8]}


def batches(count: int = 3) -> list[torch.Tensor]:
    return [images(4, seed) for seed in range(count)]


def net(seed: int = 0, kind: type[nn.Module] = TokenNet, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**({"blocks": 2} if issubclass(kind, TokenNet) else {}), **arguments).eval()


def test_a_module_in_memory(tmp_path):
    model = net(width=16).train()
    before = copy.deepcopy(model.state_dict())
    result = mlorq.compress(model, batches(), budget="4bit", rounding_iterations=30, search=QUICK)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert result.metrics["bytes"] <= result.metrics["budget_bytes"]
    assert result.metrics["bytes"] == sum(result.allocation["bytes"].to_pylist())
    assert set(result.allocation.column_names) >= set(
        ["layer", "form", "bits", "bits_a", "bits_b", "rank", "bytes", "global_cost"]
    )
    assert 0 < result.metrics["nmse"] < 0.5
    assert result.metrics["steps"]["reused"] == 0
    result.save(str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mlorq.json", "model.safetensors"]
    loaded = mlorq.load(str(tmp_path / "out"), model=net(seed=5, width=16))
    with torch.no_grad():
        for batch in batches():
            assert torch.equal(loaded(batch), result.model(batch))
    with pytest.raises(CheckpointError, match="model="):
        mlorq.load(str(tmp_path / "out"))


def test_nmse_is_measured_on_the_held_out_batches():
    model = net(width=16)
    held_out = [images(5, 77), images(3, 78)]
    result = mlorq.compress(model, batches(), budget="3bit", validation=held_out, rounding="nearest", search=QUICK)
    with torch.no_grad():
        wanted = torch.cat([model(batch) for batch in held_out]).double()
        found = torch.cat([result.model(batch) for batch in held_out]).double()
    expected = float((found - wanted).square().sum() / wanted.square().sum())
    assert result.metrics["nmse"] == pytest.approx(expected, rel=1e-6)


def test_learned_rounding_beats_nearest():
    # Generated inputs of rank 2: rounding can use what the layers really see.
    mixing = torch.randn(2, 2 * 36, generator=torch.Generator().manual_seed(0))
    data = [
        (torch.randn(16, 2, generator=torch.Generator().manual_seed(s)) @ mixing).reshape(16, 2, 6, 6) for s in range(4)
    ]
    common = {"budget": "3.5bit", "validation": data[3:], "search": {**QUICK, "factor_bits": []}}
    nearest = mlorq.compress(net(width=16), data[:3], rounding="nearest", **common)
    learned = mlorq.compress(net(width=16), data[:3], rounding="lra", rounding_iterations=200, **common)
    assert learned.allocation.equals(nearest.allocation)
    assert learned.metrics["nmse"] < 0.7 * nearest.metrics["nmse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    model = net(width=16).to(dtype)
    data = [batch.to(dtype) for batch in batches()]
    result = mlorq.compress(model, data, budget="6bit", rounding="nearest", preset="quick", search=QUICK)
    assert result.metrics["nmse"] < 0.05
    with torch.no_grad():
        assert result.model(data[0]).dtype == dtype
        result.save(str(tmp_path))
        loaded = mlorq.load(str(tmp_path), model=net(seed=3, width=16).to(dtype))
        assert torch.equal(loaded(data[0]), result.model(data[0]))


@pytest.mark.parametrize("kind", [SkipNet, SharedNet])
def test_unusual_modules(kind):
    model = net(kind=kind)
    data = batches() if kind is SkipNet else [torch.randn(4, 3, 6) for _ in range(3)]
    # Short rows: scales and zero-points are a large part of them.
    result = mlorq.compress(model, data, budget="9bit", rounding_iterations=20, search=QUICK)
    assert result.metrics["nmse"] < 0.2
    with torch.no_grad():
        assert torch.isfinite(result.model(data[0])).all()


def test_inputs_as_tuples_and_mappings_and_a_forward_of_ones_own():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, left, right):
            return {"sum": self.a(left) + self.b(right)}

    model = net(kind=Two)
    pairs = [(torch.randn(4, 6), torch.randn(4, 6)) for _ in range(2)]
    named = [{"left": left, "right": right} for left, right in pairs]
    with pytest.warns(UserWarning, match="no single tensor: errors are weighed in 'sum'; forward="):
        alone = mlorq.compress(model, pairs, budget="9bit", search=QUICK, rounding="nearest").metrics["nmse"]
    found = [
        mlorq.compress(
            model, data, budget="9bit", search=QUICK, rounding="nearest",
            forward=lambda module, batch: (module(**batch) if isinstance(batch, dict) else module(*batch))["sum"],
        ).metrics["nmse"]
        for data in (pairs, named)
    ]  # fmt: skip
    assert found[0] == found[1] == alone


def test_evaluate_sees_the_float_and_the_compressed_model():
    model = net(width=16)
    data = images(8, 3)
    result = mlorq.compress(
        model, batches(), budget="3bit", rounding="nearest", search=QUICK,
        evaluate=lambda module: {"mean": float(module(data).mean())},
    )  # fmt: skip
    with torch.no_grad():
        assert result.metrics["float"] == {"mean": float(model(data).mean())}
        assert result.metrics["compressed"] == {"mean": float(result.model(data).mean())}


def test_a_store_is_used_again(tmp_path):
    store = f"file://{tmp_path}/store"
    model = net(width=16)
    options = {"rounding_iterations": 20, "search": QUICK, "store": store}
    first = mlorq.compress(model, batches(), budget="4bit", **options)
    again = mlorq.compress(model, batches(), budget="4bit", **options)
    assert again.metrics["steps"]["computed"] == 0
    assert again.metrics["nmse"] == first.metrics["nmse"]
    other = mlorq.compress(model, batches(), budget="3bit", **options)
    assert 0 < other.metrics["steps"]["computed"] < first.metrics["steps"]["computed"] / 2


def test_a_memory_store_lasts_as_long_as_the_process():
    options = {"rounding": "nearest", "search": QUICK, "store": "memory://kept-for-this-test"}
    mlorq.compress(net(width=16), batches(), **options)
    assert mlorq.compress(net(width=16), batches(), **options).metrics["steps"]["computed"] == 0


def test_layers_left_alone_stay_float():
    model = net(width=16)
    result = mlorq.compress(
        model, batches(), budget="4bit", rounding="nearest", search=QUICK, exclude=["head", "patch"]
    )
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert "head" not in result.allocation["layer"].to_pylist()


def test_paper_accounting_counts_weight_bits_alone():
    result = mlorq.compress(
        net(width=16),
        batches(),
        budget="3bit",
        preset="quick",
        rounding="nearest",
        accounting="paper",
        search=QUICK,
    )
    counted = 0
    for row in result.allocation.to_pylist():
        weights = {"patch": 16 * 8, "head": 4 * 16}.get(row["layer"], 16 * 32)
        rows = {"patch": 16, "head": 4}.get(row["layer"], 32 if row["layer"].endswith("up") else 16)
        columns = weights // rows
        bits = (
            weights * row["bits"]
            if row["form"] == "Q"
            else row["rank"] * (rows * row["bits_a"] + columns * row["bits_b"])
        )
        assert row["bytes"] == -(-bits // 8)
        counted += row["bytes"]
    assert counted <= result.metrics["budget_bytes"] == 3 * sum([128, 64, *[512] * 4]) // 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_running_step_and_a_script_nothing(monkeypatch, capsys):
    settings = {"budget": "9bit", "rounding": "nearest", "search": QUICK}
    mlorq.compress(net(), batches(), **settings)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    mlorq.compress(net(), batches(), **settings)
    drawn = terminal.getvalue().split("\r")
    assert any(line.startswith("mlorq: sensitivity blocks.1.down 5/6  0%") for line in drawn)
    assert "\n" not in terminal.getvalue(), "one line"
    assert drawn[-2:] == [" " * len(drawn[-3].rstrip()), ""], "which is gone at the end"
    terminal.truncate(0)
    mlorq.compress(net(), batches(), **settings, progress=False)
    assert terminal.getvalue() == ""


def test_a_line_of_progress_is_replaced_while_a_step_runs():
    shown, now = [], [0.0]
    line = ProgressLine(shown.append, lambda: now[0])
    line.started("round up", 2, 6)
    for now[0] in (0.1, 0.3, 0.4, 65.0):
        line.advanced(int(now[0] * 10), 650)
    line.started("tune", 0, 1)
    line.close()
    times = ["0%  0 s", "0%  0.30 s", "100%  1 min 5 s"]  # not more often than it can be read
    assert shown == [*(f"mlorq: round up 3/6  {time}" for time in times), "mlorq: tune 1/1  0%  1 min 5 s", ""]


def test_progress_is_reported(capsys):
    seen: list[tuple[str, int, int]] = []
    mlorq.compress(
        net(), batches(), budget="9bit", rounding="nearest", search=QUICK, progress=lambda *line: seen.append(line)
    )
    assert ("capture", 1, 1) in seen
    assert ("sensitivity blocks.1.down", 5, 6) in seen
    mlorq.compress(net(), batches(), budget="9bit", rounding="nearest", search=QUICK, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "sensitivity blocks.1.down" in captured.err


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "'rapid'", {"preset": "rapid"}),
        (ConfigError, "'adaround'", {"rounding": "adaround"}),
        (ConfigError, "did you mean 'samples'", {"search": {"sampels": 3}}),
        (ConfigError, "activations.bits", {"activations": {"bits": 40}}),
        (ConfigError, "cuda:99", {"device": "cuda:99"}),
        (BudgetError, "three bits", {"budget": "three bits"}),
        (BudgetError, "smallest possible", {"budget": "0.1bit"}),
        (ConfigError, "include: pattern 'nothing' matches no linear layer", {"include": ["nothing"]}),
        (ConfigError, "exclude: pattern 'blcks.*' .*did you mean 'blocks", {"exclude": ["blcks.*"]}),
        (ModelError, "no compressible layers", {"exclude": ["*"]}),
    ],
)
def test_wrong_options_are_named(error, words, options):
    with pytest.raises(error, match=words):
        mlorq.compress(net(), batches(), **{"search": QUICK, **options})


@pytest.mark.parametrize(
    ("error", "words", "data"),
    [
        (DataError, "0 samples", []),
        (DataError, "1 samples", [images(1, 0)]),
        (DataError, "sequence", images(4, 0)),
        (DataError, "batch 1.*NaN", [images(4, 0), images(4, 0) * float("nan")]),
        (DataError, "batch 0", [3.5]),
    ],
)
def test_wrong_batches_are_named(error, words, data):
    with pytest.raises(error, match=words):
        mlorq.compress(net(), data, search=QUICK)


def test_weights_and_activations_that_are_not_finite_are_named():
    broken = net()
    broken.blocks[1].up.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"blocks\.1\.up\.weight"):
        mlorq.compress(broken, batches(), search=QUICK)
    huge = net()
    huge.blocks[0].down.bias.data.fill_(3e38)
    huge.blocks[1].down.bias.data.fill_(3e38)
    with pytest.raises(ModelError, match="layer '"):
        mlorq.compress(huge, batches(), search=QUICK)
    with pytest.raises(ConfigError, match=r"nn\.Module"):
        mlorq.compress("model", batches())

"""Random configurations, overrides and budgets: valid ones survive a round-trip, others are one line."""

from __future__ import annotations

import argparse
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.command_tools import overrides_of
from flows.template import template
from mlorq.config.bounded import read_value
from mlorq.config.budget import Budget, parse_budget
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError
from tests.fuzzing import HOSTILE, KEYS, changed, counts, damage, fuzz, one_line

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/**/*.yaml"))
TEXTS = [*(path.read_bytes() for path in EXAMPLES), template().encode()]
VALUES = [yaml.safe_load(text) for text in TEXTS]
RICH = {
    "search": {"samples": 8, "layers": {"blocks.*": {"bits": [2, 3]}}},
    "embeddings": {"bits": "auto"},
    "activations": {"bits": 4, "method": "repq"},
    "target": "onnxruntime",
    "export": [{"to": "dense"}, {"to": "onnx", "precision": "fast"}],
    "budget": ["3bit", {"disk": "25MB", "memory": "40MB"}],
    "engine": {"devices": ["cpu"], "docker": {"volumes": ["/a:/b"]}},
}
PIECES = [
    "!!python/object/apply:os.system [x]", "!!binary AA==", "!!set {a, b}", "!!timestamp 2020-99-99", "!x y", "&a [*a]",
    "*b", "&a {b: *a}", "<<: [{a: 1}, {a: 2}]", "? [a]\n: b", "? {a: b}\n: c", "---\n", "...\n", "%YAML 9.9\n", "\t",
    "2001-12-14", "1:30:00", "0x_", "0b", "1_000", ".inf", ".nan", "~", "{", "[" * 2000, "'", '"\\ud800"', '"\\x00"',
    "\ufeff", "\x85", "\u2028", "key: |\n  text", "=", "-", "1e5", "0o17", "08", "é: ü", "model: 1", "\x00", "\x1b",
]  # fmt: skip
valid: Counter[bool] = Counter()


def same(config: RunConfig, path: Path) -> None:
    """Check the round-trip of a valid configuration."""
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(path) == config
    try:
        assert all(usable(budget) for budget in config.budgets)
    except BudgetError as error:
        one_line(error)


def usable(budget: Budget) -> bool:
    """Whether a budget is finite and positive, and the same after a round-trip."""
    numbers = [budget.value, *([] if budget.memory is None else [budget.memory])]
    positive = all(isinstance(number, Fraction) and number > 0 for number in numbers)
    return (
        positive
        and "\n" not in budget.text
        and Budget.from_json(budget.to_json()) == budget
        and parse_budget(budget.text) == budget
    )


def read(path: Path, overrides: dict[str, Any] | None = None) -> RunConfig | None:
    """The configuration of a file; None if it is refused, in one line."""
    try:
        found = RunConfig.from_yaml(path, overrides)
    except ConfigError as error:
        one_line(error)
        found = None
    valid[found is not None] += 1
    return found


@counts(60, 6000)
def test_changed_values(tmp_path: Path, count: int) -> None:
    path = tmp_path / "run.yaml"
    before = valid.copy()

    @fuzz(count)
    @given(st.sampled_from([*VALUES, *({**one, **RICH} for one in VALUES)]).flatmap(changed))
    def check(values: Any) -> None:
        # As a file, and as parameters of a flow.
        try:
            path.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
        except (ValueError, yaml.YAMLError):  # a number of more digits than Python writes, a lone surrogate
            path.write_text("{}")
        found = read(path)
        if found is not None:
            same(found, path)
        try:
            direct = RunConfig.from_mapping(values, str(tmp_path))
            same(direct, path)
        except ConfigError as error:
            one_line(error)

    check()
    assert (valid - before)[True] > 0
    assert (valid - before)[False] > count // 3


@counts(40, 3000)
def test_damaged_texts(tmp_path: Path, count: int) -> None:
    path = tmp_path / "run.yaml"

    @st.composite
    def texts(draw: st.DrawFn) -> bytes:
        text = draw(st.sampled_from(TEXTS))
        if draw(st.booleans()):
            return draw(damage(text))
        lines = text.decode().splitlines(keepends=True)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(lines)))
            piece = draw(st.sampled_from(PIECES))
            if draw(st.booleans()):
                lines.insert(at, f"{piece}\n")
            else:  # in the place of a value
                key, colon, _ = lines[at % len(lines)].partition(": ")
                lines[at % len(lines)] = f"{key}{colon}{piece}\n"
        return "".join(lines).encode("utf-8", "surrogatepass")

    @fuzz(count)
    @given(texts())
    def check(text: bytes) -> None:
        path.write_bytes(text)
        found = read(path)
        if found is not None:
            same(found, path)

    check()


@counts(40, 3000)
def test_overrides_of_the_command_line(tmp_path: Path, count: int) -> None:
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    path.write_bytes(TEXTS[0])
    fields = RunConfig.model_fields
    sections = [f"{one}.{key}" for one in fields for key in ("bits", "method", "samples", "layers", "name", "x", "")]
    keys = st.sampled_from([*fields, *sections, *KEYS, "..", "data.calibration.path"]) | st.text(min_size=1, max_size=8)
    texts = st.sampled_from([*map(str, HOSTILE), *PIECES, *map(repr, HOSTILE[:-2])]) | st.text(max_size=20)

    @fuzz(count)
    @given(st.lists(st.tuples(keys, texts), min_size=1, max_size=2))
    def check(given: list[tuple[str, str]]) -> None:
        try:
            overrides = overrides_of(argparse.Namespace(set=given))
        except ConfigError as error:
            one_line(error)
            return
        found = read(path, overrides)
        if found is not None:
            same(found, again)

    check()


def test_options_are_bounded() -> None:
    for text, said in (("[" * 50_000, "nested too deeply|not YAML"), ("9" * 5000, "not YAML"), ("x" * 20_000, "10000")):
        with pytest.raises(ConfigError, match=f"--option.*({said})") as caught:
            read_value(text, "--option x: the value")
        one_line(caught.value)


NUMBER = st.one_of(
    st.integers(1, 32).map(str),
    st.integers(1, 10**6).map(str),
    st.integers(10**12, 10**40).map(str),
    st.floats(allow_nan=True).map(str),
    st.decimals(allow_nan=False, places=6).map(str),
    st.sampled_from(["", ".", ".5", "5.", "1e3", "0x10", "٣", "½", "1_0", "1,5", "9" * 5000, "0." + "0" * 500 + "1"]),
)
UNIT = st.sampled_from(["bit", "bits", "%", "kB", "MB", "MiB"]) | st.sampled_from(["Bit", "b", "Mb", "", "x", "bit%"])
SIZE = st.tuples(
    st.sampled_from(["", "", "+", "-", " "]), NUMBER, st.sampled_from(["", " ", "\n", "\u00a0"]), UNIT
).map("".join)
PARTS = st.lists(st.tuples(st.sampled_from(["disk", "memory", " disk", "x", ""]), SIZE), min_size=1, max_size=3)
BUDGET: st.SearchStrategy[Any] = st.one_of(
    SIZE,
    PARTS.map(lambda parts: ",".join(f"{key}={size}" for key, size in parts)),
    PARTS.map(dict),
    st.text(max_size=12),
    st.sampled_from(HOSTILE),
)


@counts(200, 10_000)
def test_budgets(count: int) -> None:
    found: Counter[bool] = Counter()

    @fuzz(count)
    @given(BUDGET)
    def check(asked: Any) -> None:
        try:
            budget = parse_budget(asked)
        except BudgetError as error:
            one_line(error)
            found[False] += 1
        else:
            assert usable(budget), asked
            assert budget.compressible_bytes(1000, 0) >= 0
            found[True] += 1

    check()
    assert found[True] > count // 50
    assert found[False] > count // 4

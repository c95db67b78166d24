"""Configurations that would exhaust memory or the stack are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlorq.config.bounded import check_values, read_yaml
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError

LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 20000 entries"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 100_000, "nested too deeply|not YAML"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("seed: " + "9" * 9000, "not YAML|more than 64 bits"),
        ("seed: 0x" + "f" * 9000, "more than 64 bits"),
        ("seed: " + ":".join(["59"] * 100_000), "more than 10000 characters"),
        ("store: " + "x" * 20_000, "more than 10000 characters"),
        ("x: y\n" * 300_000, "more than 1048576 characters"),
        ("x: &x 1\ny: [" + "*x, " * 300 + "]", "more than 200 aliases"),
    ],
    ids=range(11),
)
def test_bombs_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        RunConfig.from_yaml(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_values_of_flows_are_bounded_too() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    for values in ({"model": deep}, {"seed": 10**5000}, {"store": "x" * 10**6}, {"x" * 20_000: 1}):
        with pytest.raises(ConfigError) as error:
            RunConfig.from_mapping(values)
        assert len(str(error.value)) < 600


def test_aliases_and_merges_of_people_work() -> None:
    found = read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}", "text")
    check_values(found)
    assert found["b"] == {"x": 1, "y": 2}

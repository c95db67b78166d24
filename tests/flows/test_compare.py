"""``mlorq compare``: methods side by side at the same size, each computed once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.compare import PAGE, ROWS, TABLE, compare_flow
from flows.comparison import configured, notes, plan, uniform_bytes, width_for
from flows.comparison_methods import chosen, known_methods
from flows.run import known_layers, open_session
from mlorq.config.budget import Budget, parse_budget, parse_budgets
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError
from mlorq.numbers import byte_count
from tests.flows.test_cli import fails, write_project
from tests.flows.test_flows import flow_runs
from tests.long import few

NAMES = list(known_methods())
# Of every kind one: uniform, published, trained, mixed, and the default preset.
SOME = ["nearest", "erq", "brecq", "mlorq+lra", "best"]
SETTINGS = {
    "search": {"points": 2, "hessian_probes": 4, "samples": 8, "factor_bits": [4], "sum_ranks": [2]},
    "rounding": {"iterations": 6, "tuning": 2},
}


class Compared:
    """A project with one comparison of several methods, made once for the tests that only read it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.names = names
        self.config = write_project(folder, **SETTINGS)
        self.output = folder / "table"
        self.result: dict[str, Any] = {}


@pytest.fixture(scope="module", params=few([SOME, NAMES], SOME), ids=["some", "all"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Compared:
    project = Compared(tmp_path_factory.mktemp("compared"), request.param)
    output = project.config.parent / "result.json"
    argv = ["compare", project.config, "--methods", ",".join(project.names), "--budget", "4bit", "--activations", "6"]
    with pytest.MonkeyPatch.context() as patch, output.open("w") as file:
        patch.setattr(sys, "stdout", file)
        assert main([*map(str, argv), "--output", str(project.output), "--json"]) == 0
    project.result = json.loads(output.read_text())
    return project


def test_every_method_has_its_row_at_the_same_size(compared: Compared) -> None:
    rows = {row["method"]: row for row in compared.result["rows"]}
    assert list(rows) == compared.names
    uniform = {row["bytes"] for row in rows.values() if row["weights"] == "uniform"}
    assert len(uniform) == 1
    assert {row["budget_bytes"] for row in rows.values()} == uniform, "the very same bytes for all"
    assert {row["budget"] for row in rows.values()} == {"4bit"}
    for row, result in zip(rows.values(), compared.result["results"], strict=True):
        assert row["bytes"] <= min(uniform)
        assert row["asked_bytes"] < row["budget_bytes"], "layers as small as these have many scales"
        assert (result["budget"], result["budget_bytes"]) == ("4bit", row["budget_bytes"])
        assert "4bit" in row["run"]
        assert row["bits_per_weight"] == round(8 * row["budget_bytes"] / (result["float_bytes"] / 4), 3)
        assert row["bits_per_weight"] > 4
        assert row["activations"] == 6
        assert row["metric_name"] == "mean"
        assert 0 < row["nmse"] < 0.5
        assert row["seconds"] > 0
    counts = {row["Q / LR / QLR / TCQ"] for row in rows.values() if row["weights"] == "uniform"}
    assert counts == {"6 / 0 / 0 / 0"}
    assert len({row["nmse"] for row in rows.values()}) >= len(compared.names) - 2, "they are different methods"
    assert rows["best"]["nmse"] < rows["nearest"]["nmse"]
    assert len(flow_runs("compare tiny_project 4bit")) >= 1
    run = flow_runs("tiny_project 4bit brecq")[0]
    assert run.state_name == "Completed"
    assert set(run.tags) == {"mlorq", "compare", "model:tiny_project", "method:brecq"}
    assert (run.parameters["model"], run.parameters["method"]) == ("tiny_project", "brecq")


def test_the_table_is_in_the_store_and_where_it_was_asked_for(compared: Compared) -> None:
    files = compared.result["files"]
    for kind, name in (("table", TABLE), ("page", PAGE), ("rows", ROWS)):
        stored = Path(files[kind].removeprefix("file://"))
        assert stored.read_bytes() == (compared.output / name).read_bytes()
    table = pq.read_table(compared.output / TABLE)
    assert table["method"].to_pylist() == compared.names
    assert json.loads((compared.output / ROWS).read_text())["rows"] == compared.result["rows"]
    assert ">BRECQ (2102.05426)</td>" in (compared.output / PAGE).read_text()


def test_another_method_computes_only_its_own(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", str(compared.config), "--budget", "4bit", "--activations", "6"]
    assert main([*argv, "--methods", "nearest,repq"]) == 0
    shown = capsys.readouterr()
    assert "RepQ-ViT (2212.08254)" in shown.out
    given = compared.result["rows"][0]
    assert f"4bit: all methods have {byte_count(given['budget_bytes'])}" in shown.out
    assert f"the codes alone take {byte_count(given['asked_bytes'])}" in shown.out
    assert main([*argv, "--methods", "repq,best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"]["computed"] == 0
    assert main([*argv, "--methods", "erq", "--json", "--set", "activations.percentiles=[0.99, 1.0]"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"]["computed"] > 0


def test_without_a_command_line(compared: Compared) -> None:
    """As a deployment runs it: a file, or plain values."""
    found = compare_flow("run.yaml", str(compared.config.parent), ["4bit"], ["nearest", "erq"], 6)
    assert found["steps"]["computed"] == 0
    assert [row["method"] for row in found["rows"]] == ["nearest", "erq"]
    with pytest.raises(ConfigError, match="did you mean 'brecq'"):
        compare_flow("run.yaml", str(compared.config.parent), ["4bit"], ["breqc"])
    with pytest.raises(ConfigError, match="activations: 16"):
        compare_flow("run.yaml", str(compared.config.parent), ["4bit"], ["nearest"], 16)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path)
    assert "did you mean 'gptq'" in fails(capsys, "compare", config, "--methods", "gpqt")
    assert "bit-width" in fails(capsys, "compare", config, "--activations", "16")
    assert "at least 2 bits per weight" in fails(capsys, "compare", config, "--budget", "1bit")
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").glob("*/*/manifest.json"))


def test_budgets_and_settings_of_methods(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path, **SETTINGS))
    layers = known_layers(open_session(config)).layers
    assert width_for(parse_budget("3bit"), 0, layers, config) == 3
    assert width_for(parse_budget("3.0 bits"), 0, layers, config) == 3
    assert width_for(parse_budget("25%"), 10**9, layers, config) == 8
    assert width_for(parse_budget("16bit"), uniform_bytes(layers, 5, config), layers, config) == 5
    values = {"model": {"family": "custom", "factory": "tiny_project:build"}, **SETTINGS}
    values["data"] = config.data.model_dump()
    for method in chosen(NAMES):
        own = configured(method, values, config.folder, 3, 4)
        assert own.rounding.iterations == 6, "what the user says holds for all"
        assert own.search.bits == ([3] if method.uniform else RunConfig.from_mapping(values).search.bits)
        assert own.activations is not None
        assert own.activations.bits == 4
        assert own.activations.method == ("uniform" if method.name == "nearest" else own.activations.method)
    assert configured(known_methods()["mlorq+erq+lra"], values, config.folder, 3, None).rounding.start == "erq"


@pytest.mark.parametrize("text", ["3bit", "4 bits", "5.5bit", "20%", "100kB"])
def test_all_methods_have_the_very_same_bytes(tmp_path: Path, text: str) -> None:
    config = RunConfig.from_yaml(write_project(tmp_path, **SETTINGS))
    session = open_session(config)
    layers = known_layers(session).layers
    values = {"model": {"family": "custom", "factory": "tiny_project:build"}, **SETTINGS}
    values["data"] = config.data.model_dump()
    planned = plan(session, values, parse_budgets(text), chosen(NAMES), None)
    assert [one.method.name for one in planned] == NAMES
    budgets = {one.budget for one in planned}
    (bits,) = {tuple(one.config.search.bits) for one in planned if one.method.uniform}
    assert budgets == {Budget.of_layers(uniform_bytes(layers, bits[0], config), text)}
    (asked,) = {one.asked_bytes for one in planned}
    whole = parse_budget(text).whole_bits
    if whole is not None:
        assert bits == (whole,)
        assert asked == sum(layer.params for layer in layers) * whole // 8
        return
    assert uniform_bytes(layers, bits[0], config) <= asked
    assert bits == (8,) or uniform_bytes(layers, bits[0] + 1, config) > asked


def test_notes_say_what_the_bytes_are() -> None:
    rows = [
        {"budget": "3bit", "budget_bytes": 16_726, "asked_bytes": 13_992},
        {"budget": "3bit", "budget_bytes": 16_726, "asked_bytes": 13_992},
        {"budget": "20%", "budget_bytes": 900, "asked_bytes": 1_000},
        {"budget": "10%", "budget_bytes": 500, "asked_bytes": 500},
    ]
    first, second = notes(rows)
    assert first.startswith("3bit: all methods have 16,726 B (16.7 kB)")
    assert "the codes alone take 13,992 B (14.0 kB)" in first
    assert second.startswith("20%: all methods have 900 B")
    assert "within 1,000 B (1.00 kB)" in second

"""Pages and pictures of results: the report of a run, the curve, and what Prefect's pages are given."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from flows.pipeline import show
from flows.render import budgets_table, location_markdown, picture_markdown, result_line, result_markdown
from flows.run import open_session
from mlorq.checkpoint.tensor_file import digest
from mlorq.config.budget import parse_budgets
from mlorq.config.run import RunConfig
from mlorq.evaluation.page import render_report, render_sweep
from mlorq.evaluation.report import (
    data_url,
    front_picture,
    size_accuracy_picture,
    small_picture,
)
from mlorq.forms.base import FORMS
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from tests.flows.test_cli import fails, main, prints_json, write_project

BUDGETS = ("3bit", "4bit")


class Runs:
    """Two budgets of one model in a store, made without Prefect."""

    def __init__(self, folder: Path) -> None:
        self.config = write_project(folder, rounding={"method": "nearest"})
        session = open_session(RunConfig.from_yaml(self.config))
        executor = InProcess(session)
        self.results = [
            result_json(session, found) for found in run_pipeline(session, executor, parse_budgets(BUDGETS))
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def result(budget: str, size: int, nmse: float, value: float | None = 0.8) -> dict[str, Any]:
    """A result as far as pages look at it."""
    metric = None if value is None else {"name": "accuracy", "float": 0.9, "compressed": value}
    return {
        "run": f"net-{budget}", "model": "net", "budget": budget, "budget_bytes": size + 5, "bytes": size,
        "file_bytes": size + 100, "rest_bytes": 90, "float_bytes": 16_000, "predicted_cost": nmse, "nmse": nmse,
        "nmse_data": "evaluation", "metric": metric, "checkpoint": f"s3://store/compressed/{budget}",
        "solver": {"name": "highs", "status": "optimal", "gap": 0.0, "seconds": 0.1},
        "seconds": {"capture": 1.0, "round": 2.0}, "steps": {"computed": 3, "reused": 4},
        "allocation": [{"layer": "a<b>", "candidate_id": "Q3", "bytes": size, "global_cost": 0.01}],
    }  # fmt: skip


# -- the command ------------------------------------------------------------------------------------------------


def test_report_says_where_the_page_is(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    name = runs.results[0]["run"]
    found = prints_json(capsys, "report", name, runs.config)
    assert found["run"] == name
    assert found["compared_with"] == [runs.results[1]["run"]]
    assert found["output"] is None
    for key in ("page", "picture"):
        assert Path(found[key].removeprefix("file://")).is_file()
    assert main(["report", name, "--store", str(runs.config.parent / "store")]) == 0
    assert capsys.readouterr().out.splitlines() == [found["page"], found["picture"]]


def test_report_in_one_file(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    name = runs.results[0]["run"]
    assert prints_json(capsys, "report", name, runs.config, "--output", page)["output"] == str(page)
    text = page.read_text()
    assert name in text
    assert all(row["layer"] in text.replace("<wbr>", "") for row in runs.results[0]["allocation"])
    # Its own charts, its place among the others, and their predictions.
    assert len(re.findall("<svg ", text)) == 6
    assert "among 2 runs" in text.lower()
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", text)  # nothing from elsewhere


def measured(checkpoint: str) -> dict[str, Any]:
    """A result of ``mlorq benchmark`` for a checkpoint."""

    def row(name: str, seconds: float, ratio: float) -> dict[str, Any]:
        spread = {"median": ratio, "least": 0.9 * ratio, "largest": 1.3 * ratio}
        return {
            "runtime": "torch", "name": name, "bytes": 4_200_000, "resident": 7e6, "peak": 9e6, "load": 0.25,
            "first_call": 0.1, "latency": {"32": seconds}, "ratio": {"32": spread}, "throughput": {"32": 32 / seconds},
            "difference": None if name == "float" else 0.0, "nmse_added": None,
        }  # fmt: skip

    rows = [row("float", 0.02, 1.0), row("packed", 0.0421, 2.1)]
    description = digest(Path(checkpoint.removeprefix("file://"), "mlorq.json").read_bytes())
    return {"checkpoint": "elsewhere", "description": description, "threads": 1, "turns": 5, "rows": rows}


def test_report_with_a_benchmark(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, file = tmp_path / "report.html", tmp_path / "benchmark.json"
    first, second = runs.results
    file.write_text(json.dumps(measured(first["checkpoint"])))
    arguments = ("report", first["run"], runs.config, "--benchmark", file)
    assert prints_json(capsys, *arguments, "--output", page)["benchmark"] == str(file)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 1
    cells = re.findall(r"<td data-name=[^>]*>([^<]*)</td>", text)
    wanted = ["torch packed", "4.2", "7 / 9", "0.25", "42.1, 2.10x (1.89-2.73)"]
    assert cells[cells.index(wanted[0]) :][: len(wanted)] == wanted
    assert "medians of 5 cold processes each, 1 thread(s)" in text
    assert "add --output FILE.html" in fails(capsys, *arguments)
    file.write_text(json.dumps(measured(second["checkpoint"])))
    assert f"is of another checkpoint than that of run {first['run']}" in fails(capsys, *arguments, "--output", page)


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"runtime": "torch"}]}', "7"])
def test_what_is_no_benchmark_is_named(
    content: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(content)
    options = ("--output", tmp_path / "page.html", "--benchmark")
    line = fails(capsys, "report", runs.results[0]["run"], runs.config, *options, tmp_path / "other.json")
    assert f"benchmark {tmp_path / 'other.json'} is not the JSON of mlorq benchmark: " in line
    line = fails(capsys, "report", runs.results[0]["run"], runs.config, *options, tmp_path / "none.json")
    assert f"benchmark {tmp_path / 'none.json'} cannot be read: " in line


def test_report_of_a_run_that_is_not_there(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = runs.results[0]["run"]
    assert f"did you mean {name!r}?" in fails(capsys, "report", name[:-1], runs.config)
    assert "mlorq runs" in fails(capsys, "report", "nothing", runs.config)
    assert "--store" in fails(capsys, "report", name)
    (tmp_path / "file").write_text("")
    line = fails(capsys, "report", name, runs.config, "--output", tmp_path / "file" / "page.html")
    assert "cannot be written" in line


# -- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "results",
    [
        [result("3bit", 1500, 0.1), result("4bit", 2000, 0.02)],
        [result("3bit", 1500, 0.1, None), result("4bit", 2000, 0.02, None)],  # nothing but the output is compared
        [result("8bit", 4000, 0.0)],  # no logarithm of zero
        [result("3bit", 1500, 0.1, float("nan")), result("4bit", 2000, 0.02)],
    ],
    ids=["metric", "no metric", "exact", "not a number"],
)
def test_curve_is_a_picture_and_the_same_one_again(results: list[dict[str, Any]]) -> None:
    picture = size_accuracy_picture(results, "net", highlight="net-3bit")
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG"
    assert image.width > 500
    # Whatever the order they come in.
    assert size_accuracy_picture(results[::-1], "net", highlight="net-3bit") == picture


@pytest.mark.parametrize("cost", [0.02, 0.0])
def test_fronts_are_a_picture_also_where_no_layer_can_affect_the_output(cost: float) -> None:
    rows = [{"layer": "net", "form": "Q", "candidate_id": "Q3", "bytes": 96, "global_cost": cost}]
    names = ["Q2", "Q3"]
    tables = (
        pa.table({"candidate_id": names, "bytes": [64, 96]}),
        pa.table({"candidate_id": names, "global_cost": [2 * cost, cost]}),
    )
    picture = front_picture(rows, {"net": tables}, {"net": 256}, result("3bit", 96, cost))
    assert Image.open(io.BytesIO(picture)).format == "PNG"


def test_small_picture_keeps_the_colours_of_small_dots() -> None:
    picture = size_accuracy_picture(
        [result("3bit", 1500, 0.1), result("4bit", 2000, 0.02)], "net", highlight="net-3bit"
    )
    small = small_picture(picture)
    assert len(small) < 60_000
    pixels = np.asarray(Image.open(io.BytesIO(small)).convert("RGB"), dtype=int).reshape(-1, 3)
    for colour in (FORMS["Q"].colour, FORMS["LR"].colour):
        wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=1) < 40).sum() > 20


# -- pages --------------------------------------------------------------------------------------------------------


def test_pages_need_no_other_file_and_take_names_as_they_are() -> None:
    found = result("3bit", 1500, 0.1)
    page = render_report(found, picture=b"picture").decode()
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page
    assert page.count("<img") == 1
    assert data_url(b"picture") in page
    both = [found, result("4bit", 2000, 0.02)]
    assert render_report(found, runs=both).decode().count("<svg") == 3
    swept = render_sweep("net", budgets_table(both), both).decode()
    assert swept.count("<tr>") == 3
    assert swept.count("<svg") == 3


def test_markdown_links_to_what_a_browser_opens() -> None:
    assert location_markdown("https://store/a") == "[https://store/a](https://store/a)"
    assert location_markdown("s3://store/a") == "`s3://store/a`"
    page = result_markdown(result("3bit", 1500, 0.1), {"report.html": "s3://store/report.html"})
    assert page.startswith("# net-3bit\n")
    assert "| output NMSE | 0.100000 (evaluation data) |" in page
    assert "- report.html: `s3://store/report.html`" in page
    assert 'mlorq.load("s3://store/compressed/3bit")' in page
    # A page does not break the lines of a table: what is long stands below it.
    assert max(len(line) for line in page.splitlines() if line.startswith("|")) < 80
    assert picture_markdown("net", size_accuracy_picture([result("3bit", 9, 0.1)], "net")).startswith("![net](data:")


def test_budgets_table_and_line() -> None:
    (row,) = budgets_table([result("3bit", 1600, 0.1)])
    assert row["times_smaller"] == 10
    assert (row["accuracy"], row["accuracy_float"]) == (0.8, 0.9)
    allocated = result("3bit", 1600, 0.1) | {"nmse": None, "metric": None, "checkpoint": None}
    assert not {"nmse", "checkpoint"} & set(budgets_table([allocated])[0])
    assert "accuracy 0.8000 (float 0.9000)" in result_line(result("3bit", 1600, 0.1))
    assert "NMSE" not in result_line(allocated)


def test_a_page_that_cannot_be_made_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    def refuse(key: str) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("flows.pipeline.get_run_logger", lambda: logging.getLogger("flows.pipeline"))
    show("result", refuse)
    assert "'result'" in caplog.text

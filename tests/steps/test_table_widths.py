"""``embeddings: {bits: auto}``: bit-widths of embedding tables in the integer program of the layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.dry_run import least_of
from flows.run import check_budgets, known_layers
from mlorq.artifacts.store import Store
from mlorq.config.budget import parse_budget
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError
from mlorq.models.layer_list import LeftFloat
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from tests import zoo

TABLES = ("bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT classifier and texts for it."""
    folder = tmp_path_factory.mktemp("bert")
    zoo.save_text_model(folder / "model", "bert-classifier", seed=6)
    (folder / "texts.csv").write_text("".join(f"{text},{i % 2}\n" for i, text in enumerate(zoo.SENTENCES)))
    return folder


def session_of(folder: Path, **changes: Any) -> Session:
    source = {"source": "table", "path": "texts.csv", "batch_size": 4, "text": [0], "label": 1}
    values = {
        "model": {"family": "transformers", "name": "model", "task": "text-classification"},
        "data": {"calibration": source, "evaluation": source},
        "preset": "quick",
        "search": zoo.QUICK,
        "rounding": {"method": "closed_form"},
        "embeddings": {"bits": "auto", "smallest": 700},
        "engine": {"devices": "cpu", "threads": 1},
    }
    config = RunConfig.from_mapping(values | changes, str(folder))
    return Session(config, Store(config.resolve(config.store)))


def run(session: Session, *budgets: str) -> tuple[list[dict[str, Any]], set[str]]:
    """The results, and the steps that were computed."""
    computed: set[str] = set()

    def record(outcome: Any) -> None:
        computed.update([] if outcome.reused else [outcome.ref.step])

    executor = InProcess(session, record=record)
    results = run_pipeline(session, executor, [parse_budget(budget) for budget in budgets])
    return [result_json(session, result) for result in results], computed


def widths(result: dict[str, Any]) -> dict[str, int]:
    return {row["table"]: row["bits"] for row in result["embeddings"]["tables"]}


def test_the_program_chooses_tables_and_layers_together(folder: Path) -> None:
    session = session_of(folder)
    (free,), computed = run(session, "8bit")
    assert widths(free) == dict.fromkeys(TABLES, 8), "a budget in bits does not bound tables"
    assert "table_costs" in computed
    smallest = least_of(session, known_layers(session))
    sizes = [smallest.rest_bytes + smallest.bytes + smallest.tables + more for more in (200, 900, 2500)]
    results, computed = run(session_of(folder), *(f"{size}B" for size in sizes))
    assert computed <= {"allocate", "embeddings", "round", "compressed", "evaluate", "calibration", "summary"}
    for size, result in zip(sizes, results, strict=True):
        assert result["file_bytes"] <= size
        assert result["embedding_bytes"] == sum(row["bytes"] for row in result["embeddings"]["tables"])
        assert result["predicted_cost"] == pytest.approx(least(session, result), rel=1e-9)
    assert any(set(widths(result).values()) != {8} for result in results)


def test_tables_that_stay_float_have_one_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text(session_of(folder, budget="8bit").config.to_yaml())
    assert main(["compress", str(folder / "run.yaml"), "--dry-run"]) == 0
    lines = " ".join(capsys.readouterr().out.split()).split("stays float: ")[1:]
    (types,) = [line for line in lines if "bert.embeddings.token_type_embeddings" in line]
    assert "entries, fewer than embeddings.smallest = 700" in types
    assert "option embeddings" not in types, "the option is set"

    (result,), _ = run(session_of(folder), "8bit")
    rows = {row["name"]: row["reason"] for row in result["left_float"]}
    assert not rows.keys() & set(TABLES)
    assert rows["bert.embeddings.token_type_embeddings"] in types, "the same reason as in the dry run"
    assert all(LeftFloat(**row).is_foreseen for row in result["left_float"]), "no warning of small tables in Python"


def least(session: Session, result: dict[str, Any]) -> float:
    """The least cost of any widths of the tables with the layers' best within what is left."""
    from mlorq.allocation.program import Program, solve
    from mlorq.artifacts.store import ArtifactRef

    refs = {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items()}
    costs = session.artifacts.json(refs["table_costs"], "tables.json")
    names = [row["layer"] for row in result["allocation"]]
    by_role = [{name: refs[f"{role}/{name}"] for name in names} for role in ("candidates", "sensitivity")]
    layers = session.artifacts.search_space(names, *by_role).choices
    found = []
    for chosen in itertools.product(*(costs[table].values() for table in costs)):
        left = result["budget_bytes"] - sum(row["bytes"] for row in chosen)
        try:
            program = Program(layers, int(left))
            found.append(sum(row["cost"] for row in chosen) + program.cost_of(solve(program).picked))
        except BudgetError:
            continue
    return min(found)


def test_memory_bounds_tables_too(folder: Path) -> None:
    changes = {"target": {"runtime": "torch", "weights": "packed"}}
    session = session_of(folder, **changes)
    smallest = least_of(session, known_layers(session))
    assert smallest.rest_memory is not None
    assert smallest.memory is not None
    less = smallest.rest_memory + smallest.memory + smallest.tables + 200
    (bound,), _ = run(session_of(folder, **changes), f"memory={less}B")
    assert bound["memory"]["bytes"] <= less == bound["memory"]["budget_bytes"]
    rest = bound["memory"]["rest"]
    assert bound["memory"]["bytes"] == rest + bound["bytes"] + bound["embedding_bytes"], "packed: as in the checkpoint"
    assert min(widths(bound).values()) < 8


def test_an_impossible_budget_says_what_each_part_weighs(folder: Path) -> None:
    session = session_of(folder)
    with pytest.raises(BudgetError, match=r"layers take [\d,]+ B.*, the embedding tables [\d,]+ B.* and the rest"):
        check_budgets(session, known_layers(session), [parse_budget("9kB")])

"""Source ``retrieval``: texts of a search, judgements, and nDCG of sentence encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.errors import ConfigError, DataError
from mlorq.evaluation.outputs import model_outputs
from mlorq.models import load_model
from tests import zoo

QUERIES = {"q1": "dogs", "q2": "a bird", "q3": "the red mat", "q4": "slow"}
GRADES = [("q1", "0", 2), ("q1", "3", 1), ("q2", "5", 3), ("q3", "2", 1), ("q3", "1", 2), ("q4", "7", 0)]


def save(folder: Path, grades: Any = GRADES, kind: str = "bert") -> None:
    """A model, and the three tables; one document has the text of a query."""
    zoo.save_text_model(folder / "model", kind)
    (folder / "queries.tsv").write_text("\n".join(["id\ttext", *(f"{name}\t{text}" for name, text in QUERIES.items())]))
    rows = [f"{index},{text}" for index, text in enumerate(zoo.SENTENCES)]
    (folder / "documents.csv").write_text("\n".join(["id,text", *rows]))
    lines = ["query\tdocument\tgrade", *("\t".join(map(str, row)) for row in grades)]
    (folder / "judged.tsv").write_text("\n".join(lines))


def run_of(task: str = "sentence-similarity", **settings: Any) -> dict[str, Any]:
    """A configuration; ``settings`` of its evaluation data."""
    search = {"source": "retrieval", "queries": "queries.tsv", "documents": "documents.csv", "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": task},
        "data": {
            "calibration": search | {"samples": 8},
            "evaluation": search | {"judgements": "judged.tsv"} | settings,
        },
    }


def loaded(folder: Path, role: str = "evaluation", **settings: Any) -> tuple[Any, Any]:
    config = RunConfig.from_mapping({"budget": "4bit", **run_of(**settings)}, str(folder))
    model = load_model(config.model, str(folder))
    return model, load_dataset(getattr(config.data, role), role, model, config.model, str(folder), 0)


def test_a_search_is_measured_by_the_order_of_its_documents(tmp_path: Path) -> None:
    save(tmp_path)
    model, data = loaded(tmp_path)
    tokens = zoo.tokenizer()

    def embedding(text: str) -> np.ndarray:
        with torch.no_grad():
            return model.outputs(model.module, dict(tokens([text], return_tensors="pt")))[0].double().numpy()

    found = []
    for query in ("q1", "q2", "q3"):  # no document fits the last one
        judged = {document: grade for own, document, grade in GRADES if own == query}
        asked = embedding(QUERIES[query])
        cosines = [float(asked @ embedding(text)) for text in zoo.SENTENCES]  # of unit vectors
        order = sorted(range(len(cosines)), key=lambda place: -cosines[place])
        gain = sum(judged.get(str(place), 0) / np.log2(rank + 1) for rank, place in enumerate(order, 1))
        best = sum(grade / np.log2(rank + 1) for rank, grade in enumerate(sorted(judged.values(), reverse=True), 1))
        found.append(gain / best)
    outputs = model_outputs(model, model.module, data.batches)
    assert data.metric(outputs) == {"ndcg": pytest.approx(np.mean(found))}
    assert data.samples == len({*zoo.SENTENCES, *list(QUERIES.values())[:3]}) == 10, "each text once"


@pytest.mark.long
def test_a_run_over_a_search(tmp_path: Path) -> None:
    save(tmp_path)
    result = zoo.run(tmp_path, {**run_of(), "budget": "6bit"})
    assert result["metric"]["name"] == "ndcg"
    assert 0 < result["metric"]["compressed"] <= 1


def test_calibration_chooses_among_all_texts(tmp_path: Path) -> None:
    save(tmp_path)
    _, data = loaded(tmp_path, "calibration")
    assert data.samples == 8
    assert data.metric is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q9", "0", 1)], r"judged.tsv, row 2: there is no query 'q9'"),
        ([("q1", "0", 1), ("q1", "99", 1)], r"judged.tsv, row 3: there is no document '99'"),
        ([("q1", "0", "good")], r"judged.tsv, row 2: grade 'good' is not a finite number"),
        ([("q1", "0", 1), ("q1", "0", 2)], r"judged.tsv, row 3: query 'q1' and document '0' are judged twice"),
        ([("q1", "0", 0)], r"judged.tsv: no grade is above zero"),
    ],
)
def test_judgements_at_fault_are_named(rows: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("q1\tdogs", "row 6: the id 'q1' occurs twice"), ("\tdogs", "row 6: the id is missing")],
)
def test_texts_at_fault_are_named(line: str, message: str, tmp_path: Path) -> None:
    save(tmp_path)
    with (tmp_path / "queries.tsv").open("a") as file:
        file.write(f"\n{line}")
    with pytest.raises(DataError, match=message):
        loaded(tmp_path)


def test_settings_and_models_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save(tmp_path, kind="bert-classifier")
    with pytest.raises(DataError, match="source retrieval is for models with task sentence-similarity"):
        loaded(tmp_path, task="text-classification")
    with pytest.raises(DataError, match="metric 'spearman' does not fit a search; choose ndcg"):
        loaded(tmp_path, task="text-classification", metric="spearman")
    with pytest.raises(ConfigError, match="judgements: source retrieval needs them in evaluation data"):
        loaded(tmp_path, judgements=None)
    with pytest.raises(ConfigError, match="samples: the metric needs all queries and documents"):
        loaded(tmp_path, samples=3)

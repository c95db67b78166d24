"""Labels that the model cannot give are found when data is loaded, before hours of work, by file and row."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.errors import DataError
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session
from tests import zoo

FEW = {
    "budget": "5bit",
    "preset": "quick",
    "rounding": {"method": "nearest"},
    "engine": {"devices": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A ViT of seven classes, a classifier of two and a regressor, with images and texts."""
    folder = tmp_path_factory.mktemp("labels")
    state = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed=3).state_dict()
    safetensors.torch.save_file(state, folder / "vit.safetensors")
    zoo.save_text_model(folder / "two", "bert-classifier", seed=2)
    zoo.save_text_model(folder / "one", "roberta-classifier", seed=3, num_labels=1)
    for index in range(6):
        zoo.save_image(folder / "images" / f"{index}.png", index)
    for name, bad in (("good", 6), ("bad", 7)):
        rows = [f"{index}.png\t{bad if index == 4 else index}" for index in range(6)]
        (folder / f"{name}.tsv").write_text("\n".join(["file\tlabel", *rows]) + "\n")
        images = [{"bytes": (folder / "images" / f"{index}.png").read_bytes(), "path": None} for index in range(6)]
        labels = [bad if index == 4 else index for index in range(6)]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{name}.parquet", row_group_size=2)
        score = {"good": 1, "bad": 2}[name]
        texts = [f"{text},{score if index == 5 else index % 2}" for index, text in enumerate(zoo.SENTENCES)]
        (folder / f"{name}.csv").write_text("\n".join(texts) + "\n")
    scores = [f"{text},{index / 2 + 0.25}" for index, text in enumerate(zoo.SENTENCES)]
    (folder / "scores.csv").write_text("\n".join(scores) + "\n")
    return folder


def session(place: Path, model: dict, calibration: dict, evaluation: dict, **search) -> Session:
    values = {"model": model, "data": {"calibration": calibration, "evaluation": evaluation}, **FEW}
    values["search"] = {**zoo.QUICK, **search}
    values["store"] = "memory://label-checks"
    config = RunConfig.from_mapping(values, str(place))
    return Session(config, Store(config.store))


def images(name: str) -> dict:
    return {"source": "image_folder", "root": "images", "labels": f"{name}.tsv", "batch_size": 4}


def shards(name: str) -> dict:
    return {"source": "image_parquet", "path": f"{name}.parquet"}


def texts(name: str, **values) -> dict:
    return {"source": "table", "path": f"{name}.csv", "text": [0], "label": 1, "batch_size": 4, **values}


VIT = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS, "checkpoint": "vit.safetensors"}
TWO = {"family": "transformers", "name": "two", "task": "text-classification"}
ONE = {"family": "transformers", "name": "one", "task": "text-classification"}
KINDS = [(VIT, images, ["bad.tsv, row 6", "label 7", "the model has 7 classes"])]
KINDS += [(VIT, shards, ["bad.parquet, row 5, column 'label'", "label 7", "the model has 7 classes"])]
KINDS += [(TWO, texts, ["bad.csv, row 6, column 1", "label 2", "the model has 2 classes"])]


@pytest.mark.parametrize(("model", "source", "named"), KINDS)
def test_wrong_labels_are_found_before_any_work(place, model, source, named):
    made = session(place, model, source("good"), source("bad"))
    with pytest.raises(DataError) as caught:
        _ = made.evaluation
    assert all(part in str(caught.value) for part in named), str(caught.value)
    # Of calibration data only the task's loss reads labels.
    assert session(place, model, source("bad"), source("good")).calibration.labels is not None
    made = session(place, model, source("bad"), source("good"), cost="task")
    with pytest.raises(DataError) as caught:
        _ = made.calibration
    assert all(part in str(caught.value) for part in named), str(caught.value)
    made = session(place, model, source("good"), source("good"), cost="task")
    assert made.calibration.samples == made.evaluation.samples


def test_a_run_stops_before_its_first_step(place):
    made = session(place, TWO, texts("bad"), texts("good"), cost="task")
    done: list = []
    with pytest.raises(DataError, match="row 6"):
        run_pipeline(made, InProcess(made, None, done.append), made.config.budgets)
    assert done == []


def test_only_rows_that_are_used_are_looked_at(place):
    (place / "rows.txt").write_text("1\n2\n3\n4\n")
    source = texts("bad", list="rows.txt")
    made = session(place, TWO, source, source, cost="task")
    assert made.calibration.samples == made.evaluation.samples == 4
    # Errors name the row of the file, not that of the choice.
    (place / "other.txt").write_text("8\n6\n1\n")
    with pytest.raises(DataError, match="row 6"):
        _ = session(place, TWO, texts("good"), texts("bad", list="other.txt")).evaluation


def test_a_regressor_is_told_by_its_one_output(place):
    """Scores as of STS-B: no class numbers, and the correlation of values is the metric."""
    made = session(place, ONE, texts("scores"), texts("scores"), cost="task")
    assert made.evaluation.metric_name == "pearson"
    labels = torch.cat(list(made.calibration.labels))
    assert sorted(labels.tolist()) == [index / 2 + 0.25 for index in range(8)]
    with pytest.raises(DataError, match="one output"):
        _ = session(place, ONE, texts("scores"), texts("good", metric="accuracy")).evaluation
    with pytest.raises(DataError, match="one output"):
        _ = session(place, TWO, texts("good"), texts("good", metric="spearman")).evaluation


def test_a_run_of_a_regressor_on_its_labelled_loss(place):
    # Labels that the float model predicts: its loss is zero, and what compression adds is the whole loss.
    module = zoo.text_model("roberta-classifier", seed=3, num_labels=1)
    with torch.no_grad():
        own = [float(module(zoo.tokenizer()(text, return_tensors="pt")["input_ids"]).logits) for text in zoo.SENTENCES]
    lines = [f"{text},{value!r}" for text, value in zip(zoo.SENTENCES, own, strict=True)]
    (place / "own.csv").write_text("\n".join(lines) + "\n")
    values = {
        "model": ONE,
        "data": {"calibration": texts("own"), "evaluation": texts("own", metric="spearman")},
        "search": {**zoo.QUICK, "cost": "task"},
        "store": "memory://label-checks-regressor",
    }
    result = zoo.run(place, values)
    assert result["metric"]["name"] == "spearman"
    assert result["metric"]["float"] == pytest.approx(1.0)
    assert 0.5 < result["metric"]["compressed"] <= 1
    assert 0 < result["nmse"] < 0.2

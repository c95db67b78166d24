"""GLUE tasks by name: columns, classes and metrics of each, from local copies and through the datasets library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics
import torch
from pydantic import ValidationError

from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, load_dataset
from mlorq.data.glue import TASKS
from mlorq.errors import DataError
from mlorq.evaluation.outputs import model_outputs
from mlorq.extras import install_command
from mlorq.models import load_model
from tests import zoo

ModelConfig = model_section()

LEFT = zoo.SENTENCES
RIGHT = zoo.SENTENCES[3:] + zoo.SENTENCES[:3]
SCORES = [2.5, 0.3, 4.0, 1.0, 3.7, 5.0, 0.0, 2.0]
MNLI = {"id2label": {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}, "num_labels": 3}


def table(task: str, seed: int = 0, labels: list | None = None) -> pa.Table:
    """A split as the hub has it: text columns, label, idx."""
    known = TASKS[task]
    order = np.random.default_rng(seed).permutation(8)
    texts = [[column[row] for row in order] for column in (LEFT, RIGHT)]
    if labels is None:
        classes = len(known.classes)
        labels = [row % classes for row in order.tolist()] if classes else [SCORES[row] for row in order]
    kind = pa.int64() if known.classes else pa.float32()
    columns = dict(zip(known.text, texts, strict=False))
    return pa.table({**columns, "label": pa.array(labels, kind), "idx": pa.array(range(8), pa.int32())})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy of the hub's repository with every task, and models of one, two and three outputs."""
    folder = tmp_path_factory.mktemp("glue")
    for number, (task, known) in enumerate(TASKS.items()):
        (folder / "glue" / task).mkdir(parents=True)
        for index, split in enumerate(["train", *(name for name, _ in known.validation), "test"]):
            rows = table(task, 10 * number + index, [-1] * 8 if split == "test" else None)
            shards = [rows.slice(0, 5), rows.slice(5)] if split == "train" else [rows]
            for shard, part in enumerate(shards):
                name = f"{split}-{shard:05d}-of-{len(shards):05d}.parquet"
                pq.write_table(part, folder / "glue" / task / name)
    zoo.save_text_model(folder / "one", "bert-classifier", seed=3, num_labels=1)
    zoo.save_text_model(folder / "two", "bert-classifier", seed=2)
    zoo.save_text_model(folder / "three", "distilbert-classifier", seed=4, num_labels=3)
    zoo.save_text_model(folder / "named", "roberta-classifier", seed=5, **MNLI)
    zoo.save_text_model(folder / "encoder", "bert", seed=1)
    return folder


def model_config(name: str) -> ModelConfig:
    task = "sentence-similarity" if name == "encoder" else "text-classification"
    return ModelConfig(family="transformers", name=name, task=task)


def load(place: Path, task: str, role: str = "evaluation", name: str = "", seed: int = 0, **values) -> Dataset:
    name = name or {0: "one", 2: "two", 3: "three"}[len(TASKS[task].classes)]
    source = source_section()(**{"source": "glue", "task": task, "path": "glue", "batch_size": 3, **values})
    config = model_config(name)
    return load_dataset(source, role, load_model(config, str(place)), config, str(place), seed)


def refusal(*arguments, **values) -> str:
    with pytest.raises(DataError) as caught:
        load(*arguments, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def predictions(place: Path, name: str, rows: pa.Table, columns: tuple[str, ...]) -> np.ndarray:
    """The model's outputs of every row, each run alone."""
    module = load_model(model_config(name), str(place)).module
    tokens = zoo.tokenizer()
    lists = [rows[column].to_pylist() for column in columns]
    found = []
    with torch.no_grad():
        for texts in zip(*lists, strict=True):
            batch = dict(tokens(*texts, return_tensors="pt"))
            if name in ("three", "named"):  # DistilBERT and RoBERTa know no segments
                batch.pop("token_type_ids", None)
            found.append(module(**batch).logits[0].double().numpy())
    return np.stack(found)


def oracle(metric: str, outputs: np.ndarray, labels: list) -> float:
    if metric in ("pearson", "spearman"):
        function = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}[metric]
        return float(function(outputs[:, 0], labels).statistic)
    functions = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
    }
    return float(functions[metric](labels, outputs.argmax(1)))


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_has_its_own_columns_and_metrics(place, task):
    data = load(place, task)
    known = TASKS[task]
    name = {0: "one", 2: "two", 3: "three"}[len(known.classes)]
    model = load_model(model_config(name), str(place))
    found = data.metric(model_outputs(model, model.module, data.batches))
    wanted = {}
    for split, suffix in known.validation:
        rows = pq.read_table(place / "glue" / task / f"{split}-00000-of-00001.parquet")
        outputs = predictions(place, name, rows, known.text)
        wanted |= {metric + suffix: oracle(metric, outputs, rows["label"].to_pylist()) for metric in known.metrics}
    assert found == {metric: pytest.approx(value, abs=1e-5) for metric, value in wanted.items()}
    assert list(found) == list(wanted), "the task's own metric is reported first"
    assert data.metric_name == known.metrics[0]


def test_the_metrics_are_those_of_the_benchmark():
    firsts = {task: known.metrics for task, known in TASKS.items()}
    assert firsts["sst2"] == ("accuracy",)
    assert firsts["mrpc"] == firsts["qqp"] == ("f1", "accuracy")
    assert firsts["cola"][0] == "matthews"
    assert firsts["stsb"] == ("pearson", "spearman")
    assert {firsts[task] for task in ("mnli", "qnli", "rte", "wnli")} == {("accuracy",)}


def test_calibration_is_the_training_split_in_all_its_shards(place):
    data = load(place, "mrpc", "calibration")
    assert data.samples == 8
    assert data.key == load(place, "mrpc", "calibration", split="train").key
    assert data.metric is None
    assert sorted(torch.cat(list(data.labels)).tolist()) == [0] * 4 + [1] * 4
    assert load(place, "mrpc", "calibration", samples=4, seed=1).samples == 4
    # A regressor's labels are values.
    labels = torch.cat(list(load(place, "stsb", "calibration").labels))
    assert labels.is_floating_point()
    assert sorted(labels.tolist()) == pytest.approx(sorted(SCORES))


def test_mnli_is_reported_of_matched_and_mismatched_genres(place):
    both = load(place, "mnli")
    model = load_model(model_config("three"), str(place))

    def measured(data: Dataset) -> dict[str, float]:
        return data.metric(model_outputs(model, model.module, data.batches))

    matched, mismatched = (measured(load(place, "mnli", split=f"validation_{kind}")) for kind in _KINDS)
    assert measured(both) == {"accuracy": matched["accuracy"], "accuracy_mismatched": mismatched["accuracy"]}
    assert len({both.key, *(load(place, "mnli", split=f"validation_{kind}").key for kind in _KINDS)}) == 3


_KINDS = ("matched", "mismatched")


def test_classes_are_matched_by_name_where_a_model_numbers_them_another_way(place):
    rows = pq.read_table(place / "glue" / "mnli" / "validation_matched-00000-of-00001.parquet")
    data = load(place, "mnli", name="named", split="validation_matched")
    model = load_model(model_config("named"), str(place))
    found = data.metric(model_outputs(model, model.module, data.batches))
    labels = rows["label"].to_pylist()
    outputs = predictions(place, "named", rows, TASKS["mnli"].text)
    assert found["accuracy"] == oracle("accuracy", outputs[:, ::-1], labels)
    # The task's loss sees the model's own numbers; the oracle's labels are those of the texts' rows.
    known = load(place, "mnli", "calibration", name="named")
    plain = load(place, "mnli", "calibration", name="three")
    assert torch.equal(torch.cat(list(known.labels)), 2 - torch.cat(list(plain.labels)))
    assert known.key == plain.key


def test_a_metric_that_is_asked_for_comes_first(place):
    data = load(place, "mrpc", metric="accuracy")
    assert data.metric_name == "accuracy"
    assert list(data.metric(torch.eye(2)[[0] * data.samples])) == ["accuracy", "f1"]
    assert "'pearson' does not fit GLUE task 'mrpc'" in refusal(place, "mrpc", metric="pearson")
    assert "'f1' does not fit GLUE task 'mnli'" in refusal(place, "mnli", metric="f1")
    assert "'accuracy' does not fit GLUE task 'stsb'" in refusal(place, "stsb", metric="accuracy")


def test_a_sentence_encoder_is_measured_on_stsb(place):
    data = load(place, "stsb", name="encoder")
    model = load_model(model_config("encoder"), str(place))
    found = data.metric(model_outputs(model, model.module, data.batches))
    assert set(found) == {"pearson", "spearman"}
    assert load(place, "mrpc", "calibration", name="encoder").samples == 8, "every sentence once"
    assert "stsb" in refusal(place, "mrpc", name="encoder")


def test_secret_labels_of_test_splits_are_refused(place):
    message = refusal(place, "sst2", split="test")
    assert "task sst2, split test, row 1" in message
    assert "-1" in message
    assert load(place, "sst2", "calibration", split="test").labels is None


def test_local_copies_of_every_kind_are_the_same(place, tmp_path):
    datasets = pytest.importorskip("datasets")
    key = load(place, "qnli").key
    file = place / "glue" / "qnli" / "validation-00000-of-00001.parquet"
    assert load(place, "qnli", path=str(file)).key == key
    assert load(place, "qnli", path="glue/qnli").key == key
    assert load(place, "qnli", path="glue/qnli/val*.parquet").key == key
    rows = pq.read_table(file).to_pylist()
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    (tmp_path / "dev.tsv").write_text("\n".join(lines) + "\n")
    assert load(place, "qnli", path=str(tmp_path / "dev.tsv")).key == key
    # The very files, read and written by the library.
    files = {"validation": str(file), "train": str(file)}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    assert load(place, "qnli", path=str(tmp_path / "saved")).key == key
    loaded["validation"].save_to_disk(str(tmp_path / "one_split"))
    assert load(place, "qnli", path=str(tmp_path / "one_split")).key == key
    assert "no split 'dev'" in refusal(place, "qnli", path=str(tmp_path / "saved"), split="dev")


def test_lists_are_of_rows_of_one_split(place, tmp_path):
    (tmp_path / "rows.txt").write_text("3\n8\n1\n")
    chosen = load(place, "rte", list=str(tmp_path / "rows.txt"))
    assert chosen.samples == 3
    rows = pq.read_table(place / "glue" / "rte" / "validation-00000-of-00001.parquet")
    pq.write_table(rows.take([2, 7, 0]), tmp_path / "three.parquet")
    assert load(place, "rte", path=str(tmp_path / "three.parquet")).key == chosen.key
    (tmp_path / "rows.txt").write_text("3\n9\n")
    message = refusal(place, "rte", list=str(tmp_path / "rows.txt"))
    assert "'9'" in message
    assert "split validation" in message
    assert "split" in refusal(place, "mnli", list=str(tmp_path / "rows.txt"))


def test_copies_at_fault_are_named(place, tmp_path):
    assert "gone does not exist" in refusal(place, "sst2", path="gone")
    message = refusal(place, "sst2", split="dev")
    assert "'dev'" in message
    assert "test, train, validation" in message
    assert "'question'" in refusal(place, "qnli", path="glue/sst2")
    bad = table("cola", labels=[0, 1, 2, 0, 1, 0, 1, 0])
    pq.write_table(bad, tmp_path / "bad.parquet")
    message = refusal(place, "cola", path=str(tmp_path / "bad.parquet"))
    assert "row 3" in message
    assert "label 2 is out of range: the model has 2 classes" in message
    assert "one output" in refusal(place, "stsb", name="two")
    assert "one output" in refusal(place, "sst2", name="one")
    for own in ({"text": ["sentence"]}, {"label": "label"}):
        with pytest.raises(ValidationError, match=f"{next(iter(own))} is not for source glue: task 'sst2'"):
            load(place, "sst2", **own)
    (tmp_path / "noise.parquet").write_bytes(b"noise")
    assert "noise.parquet is not a Parquet" in refusal(place, "sst2", path=str(tmp_path / "noise.parquet"))


def test_a_run_reports_the_tasks_metric_first_and_the_others_too(place):
    source = {"source": "glue", "task": "mrpc", "path": "glue", "batch_size": 4}
    values = {
        "model": {"family": "transformers", "name": "two", "task": "text-classification"},
        "data": {"calibration": source, "evaluation": source},
        "store": "memory://glue-run",
    }
    result = zoo.run(place, values)
    assert result["metric"]["name"] == "f1"
    assert set(result["metrics"]["compressed"]) == set(result["metrics"]["float"]) == {"accuracy", "f1"}
    assert 0 < result["nmse"] < 0.2


# -- the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The datasets library without network, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return datasets


def test_a_hub_that_cannot_be_reached_is_one_line(place, offline):
    message = refusal(place, "sst2", path=None)
    assert "GLUE task 'sst2', split 'validation': nyu-mll/glue cannot be loaded" in message
    assert "path" in message


def test_what_the_library_has_from_the_hub_is_what_a_local_copy_has(place, offline, tmp_path, capsys):
    # The library's own files, put where it keeps what it once loaded from the hub.
    file = str(place / "glue" / "mrpc" / "validation-00000-of-00001.parquet")
    offline.load_dataset("parquet", data_files={"validation": file}, cache_dir=str(tmp_path / "made"))
    (info,) = (tmp_path / "made").rglob("dataset_info.json")
    kept = tmp_path / "hub_cache" / "nyu-mll___glue" / "mrpc" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(info.parent, kept)
    (kept / "parquet-validation.arrow").rename(kept / "glue-validation.arrow")
    described = json.loads((kept / "dataset_info.json").read_text())
    described |= {"config_name": "mrpc", "dataset_name": "glue"}
    (kept / "dataset_info.json").write_text(json.dumps(described))
    capsys.readouterr()
    assert load(place, "mrpc", path=None).key == load(place, "mrpc").key
    assert capsys.readouterr().out == "", "standard output belongs to the result"


def test_without_the_library_local_copies_still_work(place, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load(place, "rte").samples == 8
    message = refusal(place, "rte", path=None)
    assert install_command("hub") in message
    assert "path" in message

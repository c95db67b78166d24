"""Metrics of the packages evaluate and torchmetrics: values, names, errors before hours of work, whole runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch

from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.data.base import Dataset, Predicted
from mlorq.data.package_metrics import NamedMetric, known_metric, metric_location, with_named_metric
from mlorq.errors import ConfigError, DataError
from mlorq.extras import install_command
from mlorq.models import load_model
from tests import zoo

MACRO = {"metric": "torchmetrics:MulticlassF1Score", "metric_arguments": {"num_classes": 3, "average": "macro"}}
SCRIPT = """
import datasets
import evaluate

class Near(evaluate.Metric):
    def _info(self):
        values = datasets.Value("float64")
        features = datasets.Features({"predictions": values, "references": values})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, by=0.5):
        near = [abs(ours - theirs) <= by for ours, theirs in zip(predictions, references)]
        return {"rows": len(near), "near": sum(near) / len(near), "words": ["ignored"]}
"""


def section(folder: Path, labels: int = 3, **settings: Any) -> dict[str, Any]:
    zoo.save_text_model(folder / "model", "bert-classifier", num_labels=labels)
    draw = np.random.default_rng(0)
    cells = draw.integers(0, labels, 24) if labels > 1 else draw.normal(size=24).round(3)
    rows = [f"{text}\t{cell}" for text, cell in zip(zoo.SENTENCES * 3, cells, strict=True)]
    (folder / "t.tsv").write_text("\n".join(["text\tlabel", *rows]))
    table = {"source": "table", "path": "t.tsv", "text": ["text"], "label": "label", "batch_size": 5} | settings
    return {
        "budget": "6bit",
        "search": zoo.FAST,
        "model": {"family": "transformers", "name": "./model", "task": "text-classification"},
        "data": {"calibration": table, "evaluation": table},
    }


def loaded(folder: Path, values: dict[str, Any]) -> tuple[Dataset, Any, np.ndarray, np.ndarray]:
    """The evaluation data, f(x), and predictions with labels by hand."""
    config = RunConfig.from_mapping(values, str(folder))
    model = load_model(config.model, str(folder))
    data = load_dataset(config.data.evaluation, "evaluation", model, config.model, str(folder), 0)
    with torch.no_grad():
        outputs = torch.cat([model.outputs(model.module, batch) for batch in data.batches])
        tokens = [zoo.tokenizer()(text, return_tensors="pt") for text in zoo.SENTENCES * 3]
        logits = torch.cat([model.module(**one).logits for one in tokens])
    labels = [float(line.split("\t")[1]) for line in (folder / "t.tsv").read_text().splitlines()[1:]]
    values_of = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
    return data, outputs, values_of.numpy(), np.array(labels)


def test_a_class_of_torchmetrics_is_that_of_scikit_learn(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    data, outputs, predicted, labels = loaded(tmp_path, section(tmp_path, **MACRO))
    assert data.metric_name == "MulticlassF1Score"
    wanted = sklearn.metrics.f1_score(labels, predicted, average="macro")
    assert data.metric(outputs) == {"MulticlassF1Score": pytest.approx(wanted)}
    weighted = MACRO | {"metric_arguments": {"num_classes": 3, "average": "weighted"}}
    other = loaded(tmp_path, section(tmp_path, **weighted))[0]
    assert len({data.key, other.key, loaded(tmp_path, section(tmp_path))[0].key}) == 3


def test_values_of_a_regression(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    values = section(tmp_path, labels=1, metric="torchmetrics:MeanAbsoluteError")
    data, outputs, predicted, labels = loaded(tmp_path, values)
    assert data.metric(outputs) == {"MeanAbsoluteError": pytest.approx(np.abs(predicted - labels).mean(), rel=1e-5)}


@pytest.mark.long  # the package takes seconds to import
def test_a_script_of_evaluate_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evaluate", reason="needs the extra metrics")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "near.py").write_text(SCRIPT)
    values = section(tmp_path, labels=1, metric="evaluate:./near", metric_arguments={"by": 1.0})
    data, outputs, predicted, labels = loaded(tmp_path, values)
    wanted = float((np.abs(predicted - labels) <= 1.0).mean())
    found = data.metric(outputs)
    assert list(found.items()) == [("near", pytest.approx(wanted)), ("rows", 24.0)]
    (tmp_path / "near" / "near.py").write_text(SCRIPT + "\n# another version\n")
    assert loaded(tmp_path, values)[0].key != data.key
    monkeypatch.chdir("/")  # paths start from the configuration's folder
    result = zoo.run(tmp_path, values)
    assert result["metric"]["name"] == "near"
    assert result["metric"]["float"] == pytest.approx(wanted)


@pytest.mark.long
def test_a_run_reports_the_metric_of_a_package(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    values = section(tmp_path, **MACRO)
    wanted = loaded(tmp_path, values)
    result = zoo.run(tmp_path, values)
    assert result["metric"]["name"] == "MulticlassF1Score"
    assert result["metric"]["float"] == pytest.approx(wanted[0].metric(wanted[1])["MulticlassF1Score"])


def test_texts_of_recordings() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", reason="needs the extra metrics")

    class Heard:
        def predictions(self, given: Any) -> Predicted:
            return Predicted("texts", ["a dog runs", given], ["a dog", "a cat"])

        def __call__(self, given: Any) -> dict[str, float]:
            return {"wer": 0.0}

    data = with_named_metric(Dataset([], 2, "key", "wer", evaluate=Heard()), "torchmetrics:WordErrorRate", {}, "")
    assert data.evaluate is not None
    expected = torchmetrics.text.WordErrorRate()(["a dog runs", "the cat"], ["a dog", "a cat"])
    assert data.evaluate("the cat") == {"WordErrorRate": pytest.approx(float(expected))}


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (0.5, {"own": 0.5}),
        (torch.tensor(0.5), {"own": 0.5}),
        (np.float32(0.5), {"own": 0.5}),
        ({"other": 1, "own": np.array([0.5]), "none": "text", "many": [1, 2]}, {"own": 0.5, "other": 1.0}),
        ({"first": 0.25, "second": float("nan")}, {"own": 0.25, "first": 0.25}),
        (float("nan"), None),
        (torch.tensor([0.5, 0.25]), None),
        ({"own": [1.0, 2.0], "other": 1.0}, None),
    ],
)
def test_several_values(returned: Any, found: dict[str, float] | None) -> None:
    class Two:
        def predictions(self, given: Any) -> Predicted:
            return Predicted("classes", np.array([0, 1]), np.array([1, 1]))

    metric = NamedMetric("evaluate:own", "own", lambda predicted: returned, Two())
    if found is None:
        with pytest.raises(DataError, match="metric evaluate:own returned no finite number: set metric_arguments"):
            metric(torch.zeros(2))
    else:
        assert list(metric(torch.zeros(2)).items()) == sorted(found.items(), key=lambda item: item[0] != "own")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "torchmetrics:MulticlasF1"}, "torchmetrics has no metric of this name"),
        ({"metric": "torchmetrics:Metric"}, "cannot be loaded|has no metric"),
        ({"metric": "torchmetrics:MulticlassF1Score"}, "MulticlassF1Score cannot be loaded: .*num_classes"),
        (MACRO | {"metric_arguments": {"num_classes": 3, "size": 1}}, "cannot be loaded: .*size"),
        (MACRO | {"label": None}, "MulticlassF1Score needs evaluation data with labels"),
        ({"metric": "evaluate:./none"}, "metric evaluate:./none: .*none does not exist"),
    ],
)
def test_mistakes_are_named_when_data_is_loaded(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, section(tmp_path, **settings))


def test_data_without_predictions_and_refused_ones() -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra metrics")
    perplexity = Dataset([], 2, "key", "perplexity", evaluate=lambda module: {"perplexity": 1.0})
    with pytest.raises(DataError, match=r"needs predicted classes, values or texts, .* choose perplexity"):
        with_named_metric(perplexity, "torchmetrics:MeanAbsoluteError", {}, "")

    class Far:
        def predictions(self, given: Any) -> Predicted:
            return Predicted("classes", np.array([0, 7]), np.array([1, 1]))

        def __call__(self, given: Any) -> dict[str, float]:
            return {}

    data = with_named_metric(
        Dataset([], 2, "key", "accuracy", metric=Far()), MACRO["metric"], MACRO["metric_arguments"], ""
    )
    assert data.metric is not None
    with pytest.raises(DataError, match="metric torchmetrics:MulticlassF1Score failed on classes: "):
        data.metric(torch.zeros(2))


def test_mistakes_are_named_when_a_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(**settings: Any) -> None:
        RunConfig.from_mapping(section(tmp_path, **settings), str(tmp_path))

    for name in ("evaluate", "torchmetrics"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(
                ConfigError, match=re.escape(f"{name}:one needs the package {name} ({install_command('metrics')}")
            ):
                read(metric=f"{name}:one")
    for wrong in ("nothing", "sklearn:f1_score", "evaluate:", "evaluate"):
        with pytest.raises(ConfigError, match=f"metric: unknown metric '{wrong}'; known: accuracy, .*evaluate:NAME"):
            read(metric=wrong)
    with pytest.raises(ConfigError, match="metric_arguments is for metrics of other packages"):
        read(metric="accuracy", metric_arguments={"average": "macro"})
    assert known_metric("perplexity") == "perplexity"


def test_folders_of_metrics_are_locations() -> None:
    assert metric_location("evaluate:./near") == "./near"
    assert metric_location("evaluate:my/near.py") == "my/near.py"
    for other in ("evaluate:f1", "torchmetrics:Accuracy", "accuracy", None):
        assert metric_location(other) is None

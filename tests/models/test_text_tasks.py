"""Tasks ``token-classification`` and ``question-answering``: data, metrics, f(x), and whole runs."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor, nn

import mlorq
from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.data.answers import LONGEST, best_span
from mlorq.data.tags import first_tokens
from mlorq.data.text_metrics import answer_f1, entity_f1
from mlorq.errors import DataError
from mlorq.models import load_model
from mlorq.models.text_outputs import span_logits, token_logits
from tests import zoo

NAMES = ["O", "B-thing", "I-thing", "B-deed"]
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


def save(folder: Path, kind: str) -> Any:
    """A tiny BERT of a task, with its tokenizer."""
    config = transformers.BertConfig(**SIZES, id2label=dict(enumerate(NAMES)) if kind == "tags" else None)
    name = "BertForTokenClassification" if kind == "tags" else "BertForQuestionAnswering"
    module = zoo.randomised(getattr(transformers, name)(config), 0)
    module.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return module


def tagged_table(folder: Path, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Sentences with random tags, as a table of lists and as a table of texts."""
    draw = np.random.default_rng(seed)
    rows = []
    for sentence in zoo.SENTENCES * 3:
        words = sentence.split()
        rows.append((words, [str(tag) for tag in draw.choice(NAMES, len(words))]))
    pq.write_table(
        pa.table({"tokens": [row[0] for row in rows], "tags": [row[1] for row in rows]}), folder / "t.parquet"
    )
    lines = ["tokens\ttags", *("\t".join(map(" ".join, row)) for row in rows)]
    (folder / "t.tsv").write_text("\n".join(lines) + "\n")
    return rows


def questions_table(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for index, text in enumerate(zoo.SENTENCES * 3):
        answer = text.split()[index % len(text.split())]
        rows.append({"question": zoo.SENTENCES[0], "context": text, "answers": {"text": [answer], "answer_start": [0]}})
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    return rows


def run_of(kind: str, **settings: Any) -> dict[str, Any]:
    if kind == "tags":
        table = {"source": "table", "path": "t.parquet", "text": ["tokens"], "batch_size": 5, "max_length": 16}
        label, task = "tags", "token-classification"
    else:
        table = {"source": "table", "path": "q.parquet", "text": ["question", "context"], "batch_size": 5}
        label, task = "answers", "question-answering"
    table |= settings
    return {
        "model": {"family": "transformers", "name": "./model", "task": task},
        "data": {"calibration": table | {"samples": 8}, "evaluation": table | {"label": label}},
    }


def dataset(folder: Path, values: dict[str, Any], role: str = "evaluation") -> Any:
    config = RunConfig.from_mapping({"budget": "4bit", **values}, str(folder))
    model = load_model(config.model, str(folder))
    return load_dataset(getattr(config.data, role), role, model, config.model, str(folder), 0)


@pytest.mark.parametrize(("kind", "metric"), [("tags", "entity_f1"), ("answers", "answer_f1")])
def test_a_model_is_compressed_measured_and_loaded_alone(kind: str, metric: str, tmp_path: Path) -> None:
    module = save(tmp_path / "model", kind)
    (tagged_table if kind == "tags" else questions_table)(tmp_path)
    result = zoo.run(tmp_path, {**run_of(kind), "budget": "6bit"})
    assert result["metric"]["name"] == metric
    loaded = mlorq.load(result["checkpoint"].removeprefix("file://"))
    assert type(loaded) is type(module)
    data = dataset(tmp_path, run_of(kind))
    assert data.evaluate(loaded)[metric] == result["metric"]["compressed"]
    output = token_logits if kind == "tags" else span_logits
    with torch.no_grad():
        wanted, found = output(module, data.batches[0]), output(loaded, data.batches[0])
    assert 0 < float((found - wanted).square().sum() / wanted.square().sum()) < 0.05


def test_tags_are_those_of_the_first_tokens(tmp_path: Path) -> None:
    module = save(tmp_path / "model", "tags")
    rows = tagged_table(tmp_path)
    data = dataset(tmp_path, run_of("tags"))
    tokenizer = zoo.tokenizer()
    predicted, wanted = [], []
    for words, tags in rows:  # the tokenizer's own account of words
        found = tokenizer(words, is_split_into_words=True, return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            best = module(**found).logits[0].argmax(-1).tolist()
        owners = found.word_ids(0)
        places = [owners.index(word) for word in range(len(words)) if word in owners]
        predicted.append([NAMES[best[place]] for place in places])
        wanted.append([tag for word, tag in enumerate(tags) if word in owners])
    pairs = [pair for both in zip(predicted, wanted, strict=True) for pair in zip(*both, strict=True)]
    right = [ours == theirs for ours, theirs in pairs]
    found = data.evaluate(module)
    assert found["entity_f1"] == pytest.approx(entity_f1(predicted, wanted))
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert dataset(tmp_path, run_of("tags", path="t.tsv")).key == data.key, "the same texts and tags"
    assert data.key != dataset(tmp_path, run_of("tags", metric="accuracy")).key


def test_words_are_found_by_the_characters_of_their_tokens() -> None:
    words = ["ab", "c", "def"]
    plain = [(0, 0), (0, 1), (1, 2), (3, 4), (5, 7), (7, 8), (0, 0)]
    assert first_tokens(words, plain) == [(0, 1), (1, 3), (2, 4)]
    with_spaces = [(0, 2), (2, 4), (4, 8)]  # sentencepiece: the space belongs to the token behind it
    assert first_tokens(words, with_spaces) == [(0, 0), (1, 1), (2, 2)]
    assert first_tokens(words, plain[:3]) == [(0, 1)], "the others were cut off"


def test_the_best_span_is_that_of_all_spans(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tokens, first in ((12, 4), (60, 7)):
        start, end = torch.randn(2, tokens + 3, generator=generator)  # with padding behind
        spans = [None if index < first else (index, index + 1) for index in range(tokens)]
        ranges = product(range(first, tokens), range(first, tokens))
        scores = {(i, j): float(start[i] + end[j]) for i, j in ranges if i <= j < i + LONGEST}
        i, j = max(scores, key=lambda pair: scores[pair])
        assert best_span(start, end, spans) == (pytest.approx(scores[i, j]), i, j + 1)
    assert best_span(start, end, [None] * 5) is None


def test_long_texts_are_read_in_windows(tmp_path: Path) -> None:
    module = save(tmp_path / "model", "answers")
    rows = questions_table(tmp_path)
    short = dataset(tmp_path, run_of("answers", max_length=12))
    whole = dataset(tmp_path, run_of("answers"))
    assert whole.samples == len(rows) < short.samples
    assert max(batch["input_ids"].shape[1] for batch in short.batches) <= 12
    calibration = dataset(tmp_path, run_of("answers", max_length=12), "calibration")
    assert calibration.samples == 8, "one window of each text"
    # The definition, one text at a time.
    tokenizer, total = zoo.tokenizer(), 0.0
    for row in rows:
        found = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, members = found.pop("offset_mapping")[0].tolist(), found.sequence_ids(0)
        with torch.no_grad():
            output = module(**found)
        spans = [tuple(span) if member == 1 else None for span, member in zip(offsets, members, strict=True)]
        best = best_span(output.start_logits[0], output.end_logits[0], spans)
        assert best is not None
        total += answer_f1(row["context"][best[1] : best[2]], row["answers"]["text"])
    assert whole.evaluate(module)["answer_f1"] == pytest.approx(total / len(rows))


class First(nn.Module):
    """Prefers the first token, by so much."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.zeros(input_ids.shape)
        logits[:, 0] += self.by
        return transformers.modeling_outputs.QuestionAnsweringModelOutput(start_logits=logits, end_logits=logits)


@pytest.mark.parametrize("cell", ["", "dog"])
def test_texts_without_an_answer(cell: str, tmp_path: Path) -> None:
    save(tmp_path / "model", "answers")
    lines = ["question,context,answers", f"a,dog runs,{cell}", "a,dog,dog"]
    (tmp_path / "q.csv").write_text("\n".join(lines) + "\n")
    data = dataset(tmp_path, run_of("answers", path="q.csv"))
    found, none = data.evaluate(First(-1.0)), data.evaluate(First(1.0))
    if cell:  # every question has an answer: none is not an option
        assert found == none == {"answer_f1": 1.0, "exact_match": 1.0}
    else:
        assert found == none == {"answer_f1": 0.5, "exact_match": 0.5}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("tags", {"tokens": ["dog", "runs"], "tags": ["O"]}, "row 2, column 'tags': 2 words have 1 tags"),
        (
            "tags",
            {"tokens": ["dog"], "tags": ["B-none"]},
            "row 2, column 'tags': tag 'B-none' is no class of the model",
        ),
        ("tags", {"tokens": ["dog"], "tags": ["7"]}, "row 2, column 'tags': tag '7' is no class"),
        ("tags", {"tokens": [], "tags": []}, "row 2, column 'tags': the text has no words"),
        ("answers", {"question": "dog " * 30, "context": "dog", "answers": "dog"}, "row 2, .*leaves no place"),
        (
            "answers",
            {"question": None, "context": "dog", "answers": "dog"},
            "row 2, column 'question': the text is missing",
        ),
    ],
)
def test_mistakes_are_named(kind: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path / "model", kind)
    first = (
        {"tokens": ["dog"], "tags": ["O"]} if kind == "tags" else {"question": "a", "context": "dog", "answers": "a"}
    )
    pq.write_table(pa.Table.from_pylist([first, row]), tmp_path / ("t.parquet" if kind == "tags" else "q.parquet"))
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, run_of(kind, max_length=16))


def test_wrong_metrics_and_columns(tmp_path: Path) -> None:
    save(tmp_path / "model", "tags")
    tagged_table(tmp_path)
    with pytest.raises(
        DataError, match="'perplexity' does not fit tags of these classes; choose entity_f1 or accuracy"
    ):
        dataset(tmp_path, run_of("tags", metric="perplexity"))
    with pytest.raises(DataError, match="takes one text column"):
        dataset(tmp_path, run_of("tags", text=["tokens", "tags"]))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {str(index): name.lstrip("BI-") or name for index, name in enumerate(["x", "y", "z", "w"])}
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="'entity_f1' does not fit tags of these classes; choose accuracy"):
        dataset(tmp_path, run_of("tags", metric="entity_f1"), "calibration")


def test_pipelines_take_a_compressed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/MODELS.md."""
    page = (Path(__file__).parents[2] / "docs" / "MODELS.md").read_text()
    (code,) = [one for one in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "pipeline" in one]
    module = zoo.randomised(transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)), 0)
    module.save_pretrained(tmp_path / "my_model")
    zoo.tokenizer().save_pretrained(tmp_path / "my_model")
    monkeypatch.chdir(tmp_path)
    tokenizer = zoo.tokenizer()
    names = {
        "model": module,
        "texts": zoo.SENTENCES,
        "labels": ["LABEL_0", "LABEL_1"] * 4,
        "batches": [dict(tokenizer([text, text], return_tensors="pt")) for text in zoo.SENTENCES],
    }
    less = 'budget="3bit", preset="quick", rounding="nearest", search={"points": 2, "hessian_probes": 4}'
    exec(code.replace('budget="3bit"', less), names)
    result: Any = names["result"]
    accuracy: Any = names["accuracy"]
    assert result.metrics["float"] == accuracy(module)
    assert result.metrics["compressed"] == accuracy(mlorq.load("out"))

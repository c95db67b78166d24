"""Texts of a search as batches for a sentence encoder, with nDCG of the documents in the order of their cosines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mlorq.artifacts.hashing import digest_batch, digest_json
from mlorq.data.base import Dataset
from mlorq.data.choose import seeded_choice
from mlorq.data.columns import read_columns
from mlorq.data.metrics import RANKING, ndcg
from mlorq.data.retrieval import IDENTITY, JUDGED, TEXT, RetrievalSettings
from mlorq.data.texts import Text, checked_texts, tokenized
from mlorq.errors import DataError
from mlorq.models.family import TextInputs

FIRST = 10  # documents of a query that count
QUERIES = 256  # that are compared with all documents at a time

Judgements = Mapping[str, Mapping[str, float]]  # {query: {document: grade}}


def read_texts(location: str) -> dict[str, str]:
    """The texts of a table by their ids.

    Raises:
        DataError: the table cannot be read, an id or a text is missing, or an id occurs twice.
    """
    columns, numbers = read_columns(location, (IDENTITY, TEXT))

    def where(index: int) -> str:
        return f"table {location}, row {numbers[index]}"

    found: dict[str, str] = {}
    texts = checked_texts(columns[TEXT], where)
    for index, (identity, text) in enumerate(zip(columns[IDENTITY], texts, strict=True)):
        name = "" if identity is None else str(identity)
        if not name or name in found:
            raise DataError(f"{where(index)}: the id {f'{name!r} occurs twice' if name else 'is missing'}")
        found[name] = text
    return found


def read_judgements(location: str, queries: Mapping[str, str], documents: Mapping[str, str]) -> Judgements:
    """The grades of a table.

    Args:
        location: local path or fsspec URL.
        queries, documents: the known texts by their ids.

    Raises:
        DataError: the table cannot be read, names an unknown text, or judges a pair twice; a grade is not a finite
            number; or none is above zero.
    """
    columns, numbers = read_columns(location, JUDGED)
    found: dict[str, dict[str, float]] = {}
    for index, (query, document, grade) in enumerate(zip(*(columns[name] for name in JUDGED), strict=True)):
        where = f"table {location}, row {numbers[index]}"
        for kind, name, known in (("query", str(query), queries), ("document", str(document), documents)):
            if name not in known:
                raise DataError(f"{where}: there is no {kind} {name!r}")
        try:
            value = float(grade)
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise DataError(f"{where}: grade {grade!r} is not a finite number")
        own = found.setdefault(str(query), {})
        if str(document) in own:
            raise DataError(f"{where}: query {query!r} and document {document!r} are judged twice")
        own[str(document)] = value
    if not any(grade > 0 for own in found.values() for grade in own.values()):
        raise DataError(f"table {location}: no grade is above zero")
    return found


def search_dataset(
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    judgements: Judgements | None,
    settings: RetrievalSettings,
    inputs: TextInputs,
    seed: int,
) -> Dataset:
    """A data set of the texts of a search, each of them once.

    Args:
        queries, documents: texts by their ids.
        judgements: grades of evaluation data; None: calibration data, of which ``settings.samples`` texts are chosen.
            Queries without a grade above zero are left out of evaluation data.
        settings: number of samples, maximum length and batch size.
        inputs: the model's tokenizer.
        seed: of the choice of samples.

    Raises:
        DataError: there are fewer texts than samples.
    """
    if judgements is not None:
        queries = {name: queries[name] for name, own in judgements.items() if max(own.values()) > 0}
    texts: list[Text] = [(text,) for text in dict.fromkeys((*queries.values(), *documents.values()))]
    if judgements is None:
        picked = seeded_choice(len(texts), settings.samples, seed, "source retrieval", " different texts")
        texts = [texts[index] for index in picked]
    batches, order = tokenized(inputs.tokenizer(), texts, settings)
    described: dict[str, object] = {"batches": [digest_batch(batch) for batch in batches]}
    if judgements is None:
        return Dataset(batches, len(order), digest_json(described))
    places = {text: row for row, (text,) in enumerate(order)}
    column = {name: index for index, name in enumerate(documents)}
    rows = [np.array([places[text] for text in side.values()]) for side in (queries, documents)]
    grades = [{column[document]: grade for document, grade in judgements[query].items()} for query in queries]
    described |= {
        "metric": RANKING,
        "rows": [side.tolist() for side in rows],
        "grades": [sorted(own.items()) for own in grades],
    }
    metric = _Ranking(rows[0], rows[1], grades)
    return Dataset(batches, len(order), digest_json(described), RANKING, metric)


@dataclass(frozen=True)
class _Ranking:
    """Mean nDCG at ``FIRST`` of all queries, by the cosines of embeddings."""

    queries: np.ndarray  # output rows of the queries
    documents: np.ndarray
    grades: list[dict[int, float]]  # of each query: {index of a document: grade}

    def __call__(self, outputs: Tensor) -> dict[str, float]:
        values = outputs.double().numpy()
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        total = 0.0
        for start in range(0, len(self.queries), QUERIES):
            part = self.queries[start : start + QUERIES]
            cosines = values[part] @ values[self.documents].T
            grades = np.zeros_like(cosines)
            for row, own in enumerate(self.grades[start : start + QUERIES]):
                grades[row, list(own)] = list(own.values())
            total += ndcg(cosines, grades, FIRST) * len(part)
        return {RANKING: total / len(self.queries)}

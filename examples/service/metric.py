"""The task metric of an exported file, without torch and without mlorq: needs what ``inference.py`` needs.

    python metric.py model.onnx --pairs stsb-en-test.csv                            Spearman correlation
    python metric.py model.onnx --images IMAGES --labels labels.tsv --split test    top-1 accuracy

A table of pairs has no header and two texts and a score in its first three columns (``--columns`` chooses others). A
table of labels has a header with the columns ``file``, below the folder of images, ``label``, a class number, and
maybe ``split``.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from inference import Classifier, Encoder, Graph, WrongInput

BATCH = 64


def spearman(values: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation, with the mean rank for ties; 0 if either argument is constant."""
    left, right = (ranks(one) - (len(one) - 1) / 2 for one in (values, labels))
    length = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / length) if length else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values have their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def similarity_metric(encoder: Encoder, table: Path, columns: list[int]) -> tuple[float, int]:
    """Spearman correlation of cosines and scores, and the number of pairs."""
    rows = list(lines(table))
    try:
        texts = [row[column] for column in columns[:2] for row in rows]
        scores = np.array([float(row[columns[2]]) for row in rows])
    except (IndexError, ValueError) as error:
        raise SystemExit(f"{table}: columns {columns} are not two texts and a score: {error}") from None
    order = np.argsort([len(text) for text in texts], kind="stable")  # batches with little padding
    found = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        found.update(zip(batch, encoder.embeddings([texts[index] for index in batch]), strict=True))
    values = np.array([found[index] for index in range(len(texts))], np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    left, right = values[: len(rows)], values[len(rows) :]
    return spearman((left * right).sum(1), scores), len(rows)


def accuracy_metric(classifier: Classifier, folder: Path, table: Path, split: str | None) -> tuple[float, int]:
    """Share of images whose most probable class is their label, and the number of images."""
    names, *rows = lines(table)
    described = [dict(zip(names, row, strict=False)) for row in rows]
    try:
        chosen = [(one["file"], int(one["label"])) for one in described if split is None or one["split"] == split]
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{table} does not have files and class numbers: {error}") from None
    hits = [int(classifier.probabilities((folder / file).read_bytes()).argmax()) == label for file, label in chosen]
    return float(np.mean(hits)) if hits else 0.0, len(hits)


def lines(table: Path) -> Iterator[list[str]]:
    """The rows of a CSV or TSV table."""
    with table.open(newline="", encoding="utf-8") as file:
        yield from (row for row in csv.reader(file, delimiter="\t" if table.suffix == ".tsv" else ",") if row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Task metric of an exported file.")
    parser.add_argument("file", type=Path, help="exported .onnx file")
    parser.add_argument("--pairs", type=Path, help="table of two texts and a score")
    parser.add_argument("--columns", type=int, nargs=3, default=[0, 1, 2], help="numbers of its columns, from 0")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.json beside the file")
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--labels", type=Path, help="table with columns file and label")
    parser.add_argument("--split", help="only images with this value in column split")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: onnxruntime's choice")
    given = parser.parse_args()
    graph = Graph(given.file, given.threads)
    try:
        if graph.preprocessing["kind"] == "text":
            if given.pairs is None:
                parser.error(f"{given.file} takes texts: give --pairs")
            encoder = Encoder(graph, given.tokenizer or given.file.parent / "tokenizer.json")
            name, (value, count) = "spearman", similarity_metric(encoder, given.pairs, given.columns)
        else:
            if given.images is None or given.labels is None:
                parser.error(f"{given.file} takes images: give --images and --labels")
            name = "accuracy"
            value, count = accuracy_metric(Classifier(graph), given.images, given.labels, given.split)
    except (OSError, WrongInput) as error:
        raise SystemExit(str(error)) from None
    print(json.dumps({name: value, "samples": count}))


if __name__ == "__main__":
    main()

"""Task metrics as pure functions of predictions and labels, and the names of all metrics.

Configurations need the names alone, so the functions import numpy themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of samples whose label is among the k largest logits.

    Args:
        logits: ``(samples, classes)``.
        labels: ``(samples,)`` class numbers.
        k: number of top classes; at most all of them count.
    """
    import numpy as np

    k = min(k, logits.shape[1])
    best = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions ``(samples,)`` that equal their labels."""
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 score of class 1; 0 if class 1 occurs in neither predictions nor labels."""
    hits = float(((predicted == 1) & (labels == 1)).sum())
    total = float((predicted == 1).sum() + (labels == 1).sum())
    return 2 * hits / total if total else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient of classes 0 and 1; 0 if either argument is constant."""
    return pearson((predicted == 1).astype(float), (labels == 1).astype(float))


def pearson(values: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 if either argument is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(values, labels)[0, 1])


def spearman(values: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation, with the mean rank for ties; 0 if either argument is constant."""
    import numpy as np

    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return 0.0
    import scipy.stats  # the import takes a second or two

    return float(scipy.stats.spearmanr(values, labels).statistic)


def nearest_neighbours(features: np.ndarray, labels: np.ndarray, k: int = 20, temperature: float = 0.07) -> float:
    """Share of samples whose class has the largest vote of the ``k`` most similar other samples.

    A vote weighs ``exp(cosine / temperature)`` (Caron et al., arXiv 2104.14294, section 4.1: k = 20, T = 0.07). Of
    classes with equal votes the one with the smallest number counts.

    Args:
        features: ``(samples, width)``.
        labels: ``(samples,)`` class numbers.
        k: number of neighbours; at most all other samples.
        temperature: of the votes.
    """
    import numpy as np

    values = _normalised(features)
    classes, own = np.unique(labels, return_inverse=True)
    hits = 0
    for start in range(0, len(values), 1024):  # a matrix of all pairs of 50,000 images would take 20 GB
        cosine = values[start : start + 1024] @ values.T
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -np.inf
        near = np.argsort(-cosine, axis=1, kind="stable")[:, : min(k, len(values) - 1)]
        votes = np.zeros((len(cosine), len(classes)))
        np.add.at(votes, (rows[:, None], own[near]), np.exp(np.take_along_axis(cosine, near, 1) / temperature))
        hits += int((votes.argmax(1) == own[start : start + 1024]).sum())
    return hits / len(values)


def linear_probe(features: np.ndarray, labels: np.ndarray, ridge: float = 0.1) -> float:
    """Share of samples whose class a linear classifier on the features finds, trained on the other half of them.

    The halves are the samples with even and with odd numbers. The classifier is a ridge regression of the classes'
    indicators on features that are standardised by the training half (Alain and Bengio, arXiv 1610.01644, with a closed
    form): the largest of ``(x - mean) W + shares``, ``W = (XᵀX / n + ridge · I)⁻¹ XᵀY / n``.

    Args:
        features: ``(samples, width)``, at least two samples.
        labels: ``(samples,)`` class numbers.
        ridge: penalty, in units of the variance of a feature.
    """
    import numpy as np

    values = features.astype(np.float64)
    classes, own = np.unique(labels, return_inverse=True)
    wanted = np.eye(len(classes))[own]
    hits = 0
    for start in (0, 1):
        train, test = values[start::2], values[1 - start :: 2]
        mean, spread = train.mean(0), train.std(0)
        scale = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1.0), 0.0)
        x, y, n = (train - mean) * scale, wanted[start::2], len(train)
        shares = y.mean(0)
        if n < x.shape[1]:  # the same weights from the smaller of two systems
            weights = x.T @ np.linalg.solve(x @ x.T / n + ridge * np.eye(n), y - shares) / n
        else:
            weights = np.linalg.solve(x.T @ x / n + ridge * np.eye(x.shape[1]), x.T @ (y - shares) / n)
        scores = (test - mean) * scale @ weights + shares
        hits += int((scores.argmax(1) == own[1 - start :: 2]).sum())
    return hits / len(values)


def ndcg(scores: np.ndarray, grades: np.ndarray, k: int = 10) -> float:
    """Mean over the queries of the normalised discounted cumulative gain of their first ``k`` documents.

    The gain of a document is its grade, divided by ``log2(rank + 1)``; the sum is divided by that of the best order
    (Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002, with the discount that BEIR uses).
    Of documents with equal scores the one with the smaller index comes first. Queries without a grade above zero do not
    count; 0 if there are no others.

    Args:
        scores: ``(queries, documents)``, larger for documents that fit better.
        grades: ``(queries, documents)``; grades below zero count as zero.
        k: number of documents; at most all of them.
    """
    import numpy as np

    gains = np.maximum(grades.astype(np.float64), 0.0)
    rated = gains.max(axis=1) > 0
    if not rated.any():
        return 0.0
    gains, scores = gains[rated], scores[rated]
    k = min(k, gains.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    found = np.take_along_axis(gains, np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)
    best = -np.sort(-gains, axis=1)[:, :k]
    return float(((found @ discount) / (best @ discount)).mean())


def spoken_words(text: str) -> list[str]:
    """The words of a transcript: lower case, without punctuation; words with an apostrophe stay one."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub("['’]", "", text)
    return "".join(" " if unicodedata.category(letter)[0] == "P" else letter for letter in text).split()


def word_errors(words: Sequence[str], reference: Sequence[str]) -> int:
    """Least number of substitutions, deletions and insertions that make ``reference`` of ``words``.

    The rows of the table of Levenshtein distances are computed one from the other: ``row[j]`` is the distance of the
    first j words from the reference's first ones.
    """
    import numpy as np

    found = np.array(words, dtype=object)
    places = np.arange(len(found) + 1)
    row = places
    for word in reference:
        best = row + 1  # the word is missing
        best[1:] = np.minimum(best[1:], row[:-1] + (found != word))
        row = places + np.minimum.accumulate(best - places)  # further words are too many
    return int(row[-1])


def mean_iou(confusion: np.ndarray) -> float:
    """Mean over the classes that occur of intersection over union.

    A class occurs if a pixel has it as its label or as its prediction; 0 if none does.

    Args:
        confusion: ``(classes, classes)`` numbers of pixels by label (rows) and prediction (columns).
    """
    import numpy as np

    both = np.diagonal(confusion).astype(np.float64)
    either = confusion.sum(0) + confusion.sum(1) - both
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean()) if occurs.any() else 0.0


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks of bool; 1 if both are empty."""
    either = int((mask | truth).sum())
    return int((mask & truth).sum()) / either if either else 1.0


def depth_error(predicted: np.ndarray, depths: np.ndarray, align: str | None = None) -> float:
    """Mean of ``|depth - d| / d`` over pixels, with the predicted depth as it is or after an alignment.

    An alignment is the scale and shift of the predictions that least squares give. With ``depth`` they are fitted to
    the depths; with ``inverse`` to ``1 / d``, as for models that predict inverse depth up to scale and shift (Ranftl et
    al., arXiv 1907.01341, section 6), and inverted. The largest of the depths bounds what is about zero or below.

    Args:
        predicted: ``(pixels,)``.
        depths: ``(pixels,)``, above zero.
        align: None, ``depth`` or ``inverse``.
    """
    import numpy as np

    found, true = predicted.astype(np.float64), depths.astype(np.float64)
    if align is not None:
        wanted = 1 / true if align == "inverse" else true
        spread = found - found.mean()
        square = float(spread @ spread)
        slope = float(spread @ wanted) / square if square else 0.0
        found = wanted.mean() + slope * spread
    if align == "inverse":
        found = 1 / np.maximum(found, 1 / true.max())
    return float((np.abs(found - true) / true).mean())


def zero_shot_accuracy(images: np.ndarray, prompts: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose class has the largest cosine with the image.

    A class is the mean of the normalised embeddings of its prompts (Radford et al., arXiv 2103.00020, section 3.1.4).

    Args:
        images: ``(samples, width)`` embeddings.
        prompts: ``(classes, templates, width)`` embeddings.
        labels: ``(samples,)`` class numbers.
    """
    classes = _normalised(_normalised(prompts).mean(1))  # (classes, width)
    return accuracy((_normalised(images) @ classes.T).argmax(1), labels)


def first_recalls(images: np.ndarray, texts: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """Recall at 1 in both directions: the share of images whose nearest text is one of theirs, and of texts likewise.

    Args:
        images: ``(images, width)`` embeddings of different images.
        texts: ``(texts, width)`` embeddings of different texts.
        pairs: ``(pairs, 2)`` numbers of an image and of a text that belong together.
    """
    import numpy as np

    ours, theirs = _normalised(images), _normalised(texts)
    together = {(int(image), int(text)) for image, text in pairs}
    step = 1024  # a matrix of all pairs would take gigabytes
    text_of = np.concatenate([(ours[i : i + step] @ theirs.T).argmax(1) for i in range(0, len(ours), step)])
    image_of = np.concatenate([(theirs[i : i + step] @ ours.T).argmax(1) for i in range(0, len(theirs), step)])
    found = sum((image, int(text)) in together for image, text in enumerate(text_of))
    back = sum((int(image), text) in together for text, image in enumerate(image_of))
    return found / len(ours), back / len(theirs)


def _normalised(values: np.ndarray) -> np.ndarray:
    import numpy as np

    exact = values.astype(np.float64)
    normalised: np.ndarray = exact / np.maximum(np.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
    return normalised


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
TWO_CLASSES = ("f1", "matthews")
CORRELATION = {"pearson": pearson, "spearman": spearman}
DETECTION = ("box_ap", "mask_ap")  # computed by average_precision
FEATURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "knn": nearest_neighbours,
    "linear_probe": linear_probe,
}
NEIGHBOURS, PERPLEXITY, WORD_ERRORS, RANKING = "knn", "perplexity", "wer", "ndcg"
MIOU, ZERO_SHOT, RECALL = "miou", "zero_shot", "recall"
MASK_IOU, DEPTH_ERROR = "mask_iou", "depth_error"
ENTITIES, ANSWER, EXACT = "entity_f1", "answer_f1", "exact_match"  # computed by text_metrics
CHOICE, CHOICE_NORM = "choice_accuracy", "choice_accuracy_norm"  # computed by choice_scores
METRICS = (
    *CLASSIFICATION,
    *CORRELATION,
    *DETECTION,
    *FEATURES,
    PERPLEXITY,
    WORD_ERRORS,
    RANKING,
    MIOU,
    MASK_IOU,
    DEPTH_ERROR,
    ZERO_SHOT,
    RECALL,
    ENTITIES,
    ANSWER,
    EXACT,
    CHOICE,
    CHOICE_NORM,
)
